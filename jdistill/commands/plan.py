"""`jdistill plan`: estimates the memory of a training run before it starts."""

from __future__ import annotations

import argparse
import re

from jdistill.config import TrainConfig, describe, load

DESCRIPTION = """\
Estimate how much memory a training run takes on each device, from its YAML file and the student's config.json alone:
nothing is loaded, no teacher is started, and the devices need not exist. The arrays kept for the backward pass are
counted in the traced training step, so every option of the file is taken into account.

examples:
  jdistill plan configs/demo.yaml
  jdistill plan configs/gsm8k_qwen3_0.6b_from_14b.yaml --devices 8 --device-memory 80GiB
  jdistill plan configs/demo.yaml model.remat=layer optimizer.accumulate=4
  jdistill plan configs/demo.yaml --compile      # compare with the compiled step on this machine's backend

Training and sampling take turns, so the larger of the two is the peak. XLA's scratch memory and the CUDA context are
not included: leave a tenth of the device free.

exit codes: 0 it fits, or the device memory is unknown; 1 it does not fit; 2 the configuration was wrong."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.epilog = describe.help_text(TrainConfig)
    parser.add_argument("config", help="YAML file (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides; values are YAML")
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices of the machine; those of teacher.spawn are not the student's (default: local devices)",
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of one device, e.g. 80GiB (default: as reported by JAX, if it does)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also compile the step for one device and show its memory"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Estimates and prints the memory."""
    parsed = load(TrainConfig, args.config, args.overrides)  # before jax is imported: a typo is reported at once
    if args.devices is not None and args.devices < 1:
        raise ValueError(f"--devices {args.devices}: expected at least 1")
    memory = None if args.device_memory is None else _size(args.device_memory)
    import json

    from jdistill.student import devices

    parsed, _ = (parsed, "") if args.devices else devices.reserve(parsed)  # before JAX is asked for its devices
    import jax

    from jdistill.student import plan

    num_devices = args.devices or jax.device_count()
    num_taken = num_devices - devices.num_left(parsed, num_devices) if args.devices else 0
    if num_taken == num_devices:
        raise ValueError(
            f"teacher.spawn takes all {num_devices} devices: plan for more, or set teacher.offload: true (teacher and "
            "student take turns)"
        )
    num_devices -= num_taken
    made = plan.make_plan(parsed, num_devices)
    if args.compile and num_devices > 1:
        raise ValueError(f"--compile compiles for one device, and the plan is for {num_devices}: add --devices 1")
    compiled = plan.compiled_bytes(plan.make_shapes(parsed)) if args.compile else None
    if memory is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if args.json:
        phases = ("always", "training", "sampling")
        found = {phase: {item.name: item.num_bytes for item in getattr(made, phase)} for phase in phases}
        found |= {"peak_training": made.peak_training, "peak_sampling": made.peak_sampling, "peak": made.peak}
        found |= {
            "devices": num_devices,
            "teacher_devices": num_taken,
            "mesh": made.axes,
            "device_memory": memory,
            "compiled": compiled,
        }
        print(json.dumps(found))
    else:
        _print(made, num_devices, num_taken, memory, compiled)
    return int(memory is not None and made.peak > memory)


def _print(made, num_devices: int, num_taken: int, memory: int | None, compiled: dict[str, int] | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    axes = ", ".join(f"{axis} {size}" for axis, size in made.axes.items())
    title = f"{num_devices} device(s): {axes}"
    if num_taken:
        title = f"{num_devices + num_taken} devices, of which teacher.spawn takes {num_taken}; the student's {title}"
    table = Table("", "each device", "reduced by", title=title, title_justify="left", box=box.SIMPLE)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[1].justify = "right"
    phases = [("always", made.always, None), ("while training", made.training, made.peak_training)]
    if made.sampling:
        phases.append(("while sampling", made.sampling, made.peak_sampling))
    for title, items, peak in phases:
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", "", "")
        for item in sorted(items, key=lambda item: -item.num_bytes):
            table.add_row(f"  {item.name}", _text(item.num_bytes), item.remedy)
        if peak is not None:
            table.add_row("  [bold]peak, including what is always held[/bold]", f"[bold]{_text(peak)}[/bold]", "")
    console.print(table)
    if compiled is not None:
        console.print(
            f"The compiled step: {_text(compiled['arguments'])} of arguments + {_text(compiled['temporaries'])} of "
            f"temporaries = {_text(compiled['peak'])}; the plan is {made.peak_training / compiled['peak']:.2f} of it."
        )
    if memory is None:
        console.print(f"Peak: {_text(made.peak)} on each device.")
    elif made.peak <= memory:
        console.print(f"Peak: {_text(made.peak)} of {_text(memory)} on each device: it fits.")
    else:
        trains = made.peak_training == made.peak
        largest = max((i for i in made.always + (made.training if trains else made.sampling) if i.remedy), key=_bytes)
        console.print(
            f"Peak: {_text(made.peak)} of {_text(memory)} on each device: [bold]it does not fit[/bold]. The largest "
            f"part is {largest.name} ({_text(largest.num_bytes)}): change {largest.remedy}."
        )


def _bytes(item) -> int:
    return item.num_bytes


def _text(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    unit = match[2].upper().removesuffix("B") if match else ""
    units = {name.removesuffix("B"): size for name, size in _UNITS.items()}
    try:
        return int(float(match[1]) * units[unit])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"--device-memory {text!r}: expected a number and a unit, e.g. 80GiB or 141GB") from None
