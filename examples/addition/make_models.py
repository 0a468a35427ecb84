"""Writes the demo's models without weights: DIR/teacher (4 layers) and DIR/student (2 layers), with their tokenizer.

    python examples/addition/make_models.py DIR

`jdistill train` with `objective.kind: supervised` and `model.init: random` then trains the weights.
"""

import argparse
import pathlib

from jdistill.tasks.addition import write_model

NUM_LAYERS = {"teacher": 4, "student": 2}


def main() -> None:
    """Parses the argument and writes both directories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    to = parser.parse_args().dir
    for name, num_layers in NUM_LAYERS.items():
        write_model(to / name, num_layers=num_layers)
        print(to / name)


if __name__ == "__main__":
    main()
