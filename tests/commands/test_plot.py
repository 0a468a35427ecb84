import itertools
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from jdistill import cli, report
from jdistill.report.picture import _apart
from jdistill.report.summary import curve_of


def write_run(path, rows, **config):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.json").write_text(json.dumps({"run_dir": str(path), **config}))
    return path


def rows(accuracy, *, tokens=1000, every=5, num_steps=20, reward=0.5, kl=None):
    """An evaluation every `every` steps that goes linearly from 0.1 to `accuracy`."""
    result = []
    for step in range(num_steps + 1):
        row = {"step": step, "sampled_tokens": tokens * step}
        if step % every == 0:
            row["eval/accuracy"] = 0.1 + (accuracy - 0.1) * step / num_steps
        if step:
            row["reward"] = reward
            if kl is not None:
                row["reverse_kl"] = kl / step
        result.append(row)
    return result


@pytest.fixture
def groups(tmp_path):
    return {
        "RL only": [
            write_run(tmp_path / f"rl-seed{s}", rows(a), lr=1e-4, seed=s) for s, a in enumerate((0.1, 0.2, 0.3))
        ],
        "RL + distillation": [
            write_run(tmp_path / f"kd-seed{s}", rows(a, tokens=2000, kl=1.0), lr=6e-4, seed=s)
            for s, a in enumerate((0.5, 0.7))
        ],
    }


def test_final_numbers_are_mean_smallest_and_largest_over_the_seeds(groups, tmp_path):
    rl, both = report.draw(groups, tmp_path / "p.png", tmp_path / "p.html", "title")
    assert (rl.label, rl.num_runs, rl.sampled_tokens) == ("RL only", 3, 20_000)
    np.testing.assert_allclose(rl.final["eval/accuracy"], (0.2, 0.1, 0.3))
    np.testing.assert_allclose(both.final["eval/accuracy"], (0.6, 0.5, 0.7))
    # The mean of 1/step over the last 9 of 20 steps, by another route.
    np.testing.assert_allclose(both.final["reverse_kl"], [sum(1 / step for step in range(12, 21)) / 9] * 3)
    assert "reverse_kl" not in rl.final  # RL alone has no teacher: no number, rather than 0


def test_the_lines_drawn_are_the_means_and_the_bands_the_extremes(groups):
    runs = [report.read_run(path) for path in groups["RL only"]]
    curve = curve_of(runs, "eval/accuracy")
    np.testing.assert_allclose(curve.x, [0, 5000, 10_000, 15_000, 20_000])
    np.testing.assert_allclose(curve.mean, np.linspace(0.1, 0.2, 5))
    np.testing.assert_allclose(curve.low, np.full(5, 0.1))
    np.testing.assert_allclose(curve.high, np.linspace(0.1, 0.3, 5))


def test_seeds_are_compared_only_where_all_of_them_have_been(tmp_path):
    whole = write_run(tmp_path / "a", rows(0.5))
    going = write_run(tmp_path / "b", rows(0.5)[:12])  # 11 steps so far
    with open(going / "metrics.jsonl", "a") as f:
        f.write('{"step": 12, "eval/accu')  # being written at this moment
    curve = curve_of([report.read_run(whole), report.read_run(going)], "eval/accuracy")
    assert curve.x.tolist() == [0, 5000, 10_000]


def test_a_value_that_is_not_finite_is_left_out_rather_than_drawn(tmp_path):
    values = rows(0.5)
    values[5]["eval/accuracy"] = float("nan")
    curve = curve_of([report.read_run(write_run(tmp_path / "a", values))], "eval/accuracy")
    assert curve.x.tolist() == [0, 10_000, 15_000, 20_000]


def test_runs_that_sample_nothing_are_drawn_against_steps(tmp_path):
    supervised = [{"step": step, "loss": 1 / (step + 1), "eval/accuracy": 0.1} for step in range(10)]
    (summary,) = report.draw(
        {"supervised": [write_run(tmp_path / "a", supervised)]}, tmp_path / "p.png", tmp_path / "p.html", "t"
    )
    assert summary.sampled_tokens is None
    page = (tmp_path / "p.html").read_text()
    assert ">steps</text>" in page and ">sampled tokens</text>" not in page


def test_the_page_is_self_contained_and_its_picture_is_well_formed(groups, tmp_path):
    notes = ["<b>not markup</b> & more"]
    report.draw(groups, tmp_path / "p.png", tmp_path / "p.html", "Title <1>", notes, teacher={"eval/accuracy": 0.988})
    page = (tmp_path / "p.html").read_text()
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'<> ]*", page)) <= namespaces  # names, not addresses that are fetched
    assert not re.search(r"<(link|script|img|iframe)|@import|url\((?!#)", page)
    assert "&lt;b&gt;not markup&lt;/b&gt; &amp; more" in page and "Title &lt;1&gt;" in page
    svg = xml.etree.ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    texts = {"".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"RL only", "RL + distillation", "teacher 0.988", "sampled tokens", "0.60  (0.50 to 0.70)"} <= texts
    # Every colour of the picture is a variable, so that the dark page is readable.
    assert not re.search(r"#[0-9a-f]{6}", page[page.index("<svg") : page.index("</svg>")])
    for variable in set(re.findall(r"var\((--\w+)\)", page)):
        assert len(re.findall(rf"{variable}:#[0-9a-f]{{6}}", page)) == 2, variable  # light and dark


def test_the_page_says_what_differs_between_the_arms_and_how_to_make_them_again(groups, tmp_path):
    report.draw(groups, tmp_path / "p.png", tmp_path / "p.html", "t")
    page = (tmp_path / "p.html").read_text()
    assert "<tr><th><code>lr</code></th><td>0.0001</td><td>0.0006</td></tr>" in page
    assert "<code>seed</code>" not in page and "<code>run_dir</code>" not in page
    assert f"jdistill train {groups['RL only'][2]}/config.json run_dir=NEW" in page
    report.draw(groups, tmp_path / "p.png", tmp_path / "p.html", "t", commands=["make figure"])
    page = (tmp_path / "p.html").read_text()
    assert "<pre>make figure</pre>" in page and "jdistill train" not in page


def test_the_same_runs_give_the_same_bytes(groups, tmp_path):
    for name in ("one", "two"):
        report.draw(groups, tmp_path / f"{name}.png", tmp_path / f"{name}.html", "t")
    for suffix in ("png", "html"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_labels_do_not_overlap_and_stay_in_place_where_there_is_room():
    assert _apart([0.2, 0.5, 0.8], [0.1, 0.1, 0.1]) == pytest.approx([0.2, 0.5, 0.8])
    draw = np.random.default_rng(0)
    for _ in range(200):
        centers = np.sort(draw.uniform(size=5)).tolist()
        heights = draw.uniform(0.05, 0.19, size=5).tolist()
        placed = _apart(centers, heights)
        edges = [(c - h / 2, c + h / 2) for c, h in zip(placed, heights, strict=True)]
        assert edges[0][0] >= -1e-9 and edges[-1][1] <= 1 + 1e-9
        assert all(below[1] <= above[0] + 1e-9 for below, above in itertools.pairwise(edges))


def test_more_groups_than_colours_are_still_drawn(tmp_path):
    groups = {f"arm {i}": [write_run(tmp_path / str(i), rows(0.1 * i))] for i in range(9)}
    assert len(report.draw(groups, tmp_path / "p.png", tmp_path / "p.html", "t")) == 9


def test_the_command_groups_runs_by_all_but_the_seed(groups, tmp_path, capsys):
    runs = [str(path) for members in groups.values() for path in members]
    assert cli.main(["plot", *runs]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^rl +3 +20,000", out, re.M) and re.search(r"^kd +2 +40,000", out, re.M)
    assert (tmp_path / "plot.png").stat().st_size > 10_000 and (tmp_path / "plot.html").exists()


def test_the_command_takes_groups_by_name(groups, tmp_path, capsys):
    one, two = groups["RL + distillation"]
    argv = ["plot", "--group", f"a = b={one},{two}", str(groups["RL only"][0]), "--to", str(tmp_path / "new" / "dir")]
    assert cli.main([*argv, "--teacher-accuracy", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "a = b" in out and "rl-seed0" in out and "teacher" in out
    assert (tmp_path / "new" / "dir" / "plot.html").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to draw: give run directories"),
        (["nowhere"], "no metrics.jsonl in nowhere: give the run_dir of a `jdistill train`"),
        (["--group", "a"], "--group 'a': expected LABEL=RUN,RUN"),
        (["--group", "a=x", "--group", "a=y"], "--group 'a' is given twice"),
    ],
)
def test_a_wrong_request_says_what_to_give(argv, message, capsys):
    assert cli.main(["plot", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_broken_or_empty_file_is_an_error_that_names_it(tmp_path):
    broken = write_run(tmp_path / "broken", rows(0.5))
    text = (broken / "metrics.jsonl").read_text()
    (broken / "metrics.jsonl").write_text(text.replace('{"step": 2', '{"stop": 2'))
    with pytest.raises(ValueError, match=r"metrics.jsonl line 3: expected a JSON object with a step"):
        report.read_run(broken)
    with pytest.raises(ValueError, match="holds no finished step yet"):
        report.read_run(write_run(tmp_path / "empty", []))
    other = write_run(tmp_path / "other", [{"step": 1, "grad_norm": 1.0}])
    with pytest.raises(ValueError, match=r"nothing to draw: the runs have none of eval/accuracy"):
        report.draw({"other": [other]}, tmp_path / "p.png", tmp_path / "p.html", "t")
