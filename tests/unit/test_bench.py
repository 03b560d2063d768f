"""The bench: what its rows, table, chart and measurements say, and that its baseline does the work it is named for."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cxr_dist.bench import measure, report
from cxr_dist.bench import options as bench_options
from cxr_dist.bench.measure import Timing, Usage, in_turns
from cxr_dist.bench.options import BenchOptions, ImageSet, load_images, write_release
from cxr_dist.bench.report import Row, chart, from_json, machine, ratios, table, to_json
from cxr_dist.cli import run_job
from cxr_dist.data import images, nih
from cxr_dist.errors import ConfigError, DataError, InputError
from tests.releases import noise, png

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    Row(stage="decode", name="baseline", images=64, images_per_s=60.54, ratios={"baseline": 1.0}),
    Row(
        stage="decode",
        name="ours",
        images=6400,
        images_per_s=246.0,
        ratios={"baseline": 4.063, "limit": 0.931},
        cpu_ms_per_image=4.065,
        bytes_read=26_000_000,
        extra={"inflated by": "isal", "resize ms": 0.4567},
    ),
    Row(stage="step", name="eager", images=16, peak_rss_mb=1234.5, extra={"tflop_per_s": 0.05}),
]


def options(tmp_path: Path, **changed: Any) -> BenchOptions:
    return BenchOptions(**{"out": tmp_path, "repeats": 1, **changed})


@pytest.fixture
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_job", ROOT / "jobs" / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_over_what_was_measured():
    assert ratios(90.0, {"a": 60.0, "b": 120.0, "missing": None}) == {"a": 1.5, "b": 0.75}


def test_table_has_a_part_for_each_stage_and_no_empty_column():
    assert table(ROWS).splitlines() == [
        "| decode   | images | images/s | × baseline | × limit | CPU ms/image | read MB | inflated by | resize ms |",
        "|----------|-------:|---------:|-----------:|--------:|-------------:|--------:|------------:|----------:|",
        "| baseline |     64 |     60.5 |       1.00 |         |              |         |             |           |",
        "| ours     |  6,400 |      246 |       4.06 |    0.93 |         4.07 |    26.0 | isal        |     0.457 |",
        "",
        "| step  | images | peak RSS MB | tflop_per_s |",
        "|-------|-------:|------------:|------------:|",
        "| eager |     16 |       1,234 |        0.05 |",
    ]


def test_json_gives_the_rows_back():
    result = json.loads(json.dumps(to_json(ROWS, machine={"cpu": "x"}, options={"stage": "all"}), allow_nan=False))
    assert from_json(result) == ROWS
    assert "object_store_mb" not in result["rows"][0]
    with pytest.raises(DataError, match="found format 2, expected 1"):
        from_json({**result, "format": 2})


def test_machine_says_what_figures_depend_on():
    about = machine()
    assert {"cpu", "cores", "ram_gb", "gpu", "os", "python", "date", "commit", "load_1min"} < set(about)
    assert {"torch", "ray", "numpy", "pyarrow", "pillow", "kornia_rs"} < set(about)
    assert about["numpy"] == np.__version__
    json.dumps(about, allow_nan=False)


def test_chart_has_a_bar_for_each_rate_and_cuts_the_one_that_dwarfs_the_others(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    rows = [*ROWS, Row(stage="decode", name="pixels", images=1, images_per_s=50_000.0)]
    chart(to_json(rows, machine=machine(), options={}), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    [panel] = drawn[0].axes
    assert panel.get_title(loc="left") == "decode"
    assert [round(bar.get_width(), 1) for bar in panel.patches] == [60.5, 246.0, 282.9]
    assert [bar.get_hatch() or "" for bar in panel.patches] == ["", "", "//"]
    assert [text.get_text() for text in panel.texts] == [" 60.5", " 246  (4.06 × baseline, 0.931 × limit)", " 50,000"]
    with pytest.raises(DataError, match="found no row with images per second"):
        chart(to_json(ROWS[2:], machine={}, options={}), tmp_path / "none.png")


def test_each_round_runs_all_in_turn_and_the_best_run_counts(monkeypatch):
    walls = {"a": [4.0, 3.0, 5.0], "b": [2.0, 2.5, 1.0]}
    order: list[str] = []

    def timed(work: Any) -> Timing:
        name = work()
        order.append(name)
        number = order.count(name) - 1
        return Timing(images=10, wall_s=walls[name][number], cpu_s=10 - walls[name][number])

    monkeypatch.setattr(measure, "_timed", timed)
    variants: Any = {"a": lambda: "a", "b": lambda: "b"}
    best = in_turns(variants, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: timing.wall_s for name, timing in best.items()} == {"a": 3.0, "b": 1.0}
    assert best["b"].images_per_s == 10.0
    order.clear()
    assert in_turns(variants, 3, by_cpu=True)["a"] == Timing(images=10, wall_s=5.0, cpu_s=5.0)


def test_timing_is_per_image():
    timing = Timing(images=8, wall_s=4.0, cpu_s=2.0)
    assert (timing.images_per_s, timing.images_per_core_s, timing.cpu_ms_per_image) == (2.0, 4.0, 250.0)


BURN = "import time\nwhile time.process_time() < 0.4: pass\n"


def test_cpu_time_of_children_is_counted_whether_they_ended_or_not():
    def work() -> int:
        subprocess.run([sys.executable, "-c", BURN], check=True)
        return 1

    [timing] = in_turns({"child": work}, 1, warm=False).values()
    assert timing.cpu_s >= 0.4
    waiting = BURN + "print('done', flush=True); input()"
    with Usage() as usage:
        work()
        child = subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    child.communicate(b"\n")
    assert usage.cpu_s >= 0.7  # both, less a hundredth of a second for each of the kernel's roundings


@pytest.mark.parametrize("waits", [True, False])
def test_cpu_time_of_a_childs_child_is_counted_once(waits):
    """Ray's workers are children of a process that does not wait for them, so nobody but a sample knows their time."""
    parent = (
        "import signal, subprocess, sys\n"
        f"if not {waits}: signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {BURN!r}.replace('0.4', '1.5')], stdout=subprocess.PIPE)\n"
        "child.stdout.read()\n"
        f"if {waits}: child.wait()\n"
        "print(flush=True); input()"
    )
    with Usage() as usage:
        child = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    child.communicate(b"\n")
    assert (1.45 if waits else 0.7) <= usage.cpu_s <= 2.3


def test_peak_memory_is_the_private_memory_of_the_tree():
    program = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); print(flush=True); input()"
    with Usage() as before:
        pass
    with Usage() as usage:
        child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    child.communicate(b"\n")
    assert 190 <= usage.peak_rss_mb - before.peak_rss_mb <= 260
    assert usage.peak_object_store_mb == 0


def test_given_images_are_repeated_under_names_of_their_own(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    distinct = [png(noise(i, 24)) for i in range(3)]
    for name, data in zip(("b.png", "deeper/c.PNG", "a.png"), distinct, strict=True):
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "readme.txt").write_text("not an image")
    found = load_images(options(tmp_path, images=str(tmp_path / "in"), num_images=7), 2)
    assert list(found) == [distinct[i] for i in (2, 0, 1, 2, 0, 1, 2)]
    assert found.num_bytes == sum(len(data) for data in found)
    assert len({found.name(i) for i in range(5000)}) == 5000
    assert len(load_images(options(tmp_path, images=str(tmp_path / "in")), 2)) == 2
    with pytest.raises(InputError, match=r"found no \.png file"):
        load_images(options(tmp_path, images=str(tmp_path / "none")), 2)


def test_drawn_images_are_those_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_options, "NUM_DRAWN", 2)
    first = load_images(options(tmp_path, num_images=3), 9)
    assert (len(first), len(first.distinct)) == (3, 2)
    assert images.decode(first[0]).shape == (1024, 1024)
    (tmp_path / "other").mkdir()
    assert load_images(options(tmp_path / "other", num_images=3), 9) == first
    assert load_images(options(tmp_path / "other", num_images=3, seed=1), 9).distinct[0] != first[0]


def test_a_release_is_what_ingest_reads(tmp_path):
    written = ImageSet(distinct=(png(noise(0, 16)), png(noise(1, 16))), num_images=30, source="noise")
    write_release(written, tmp_path / "release")
    files = sorted((tmp_path / "release" / "images").iterdir())
    assert [file.read_bytes() for file in files] == list(written)
    assert len({file.stat().st_ino for file in files}) == 2
    labels = nih.read_labels((tmp_path / "release" / "Data_Entry_2017.csv").read_bytes(), "Data_Entry_2017.csv")
    assert labels["image_id"].to_pylist() == [file.name for file in files]
    lists = [(tmp_path / "release" / name).read_text().split("\n") for name in ("train_val_list.txt", "test_list.txt")]
    assert sorted(lists[0] + lists[1]) == [file.name for file in files]
    assert len(lists[1]) == 4


def test_stored_is_the_same_image_uncompressed():
    from cxr_dist.bench import decode

    for data in (png(noise(3, 40)), png(noise(3, 40), "RGBA")):
        plain = decode.stored(data)
        assert len(plain) > 40 * 41
        assert (images.decode(plain) == images.decode(data)).all()
        unpack, _ = decode.inflate()
        assert unpack(decode.image_data(data)) == zlib.decompress(decode.image_data(plain))
    with pytest.raises(DataError, match="found a file that is no PNG"):
        decode.image_data(b"\xff\xd8")


def test_decode_rows_are_ratios_of_one_another(tmp_path, real_or_drawn):
    from cxr_dist.bench import decode

    rows = {row.name: row for row in decode.run(options(tmp_path, images=real_or_drawn, num_images=3))}
    ours, limit = rows[decode.GREY], rows["limit: inflate + undo filters + resize"]
    assert ours.ratios["notebooks"] == ours.images_per_s / rows[decode.TRAINING].images_per_s
    assert ours.ratios["notebooks_eval"] == ours.images_per_s / rows[decode.EVALUATION].images_per_s
    assert ours.ratios["limit"] == ours.images_per_s / limit.images_per_s
    parts = ("inflate ms", "undo filters ms", "resize ms")
    assert limit.cpu_ms_per_image == pytest.approx(sum(limit.extra[part] for part in parts))
    assert rows["pixel shards, 8-bit grey"].images == 3 * decode.PIXEL_COPIES
    assert all(row.stage == "decode" for row in rows.values())


@pytest.fixture
def real_or_drawn(tmp_path) -> str:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(noise(number, 64)))
    return str(folder)


def test_without_isal_the_row_says_so(monkeypatch):
    from cxr_dist.bench import decode

    monkeypatch.setitem(sys.modules, "isal", None)
    unpack, what = decode.inflate()
    assert unpack is zlib.decompress
    assert what.startswith("zlib (pip install cxr-dist[bench]")


def test_the_baseline_sees_the_pixels_that_we_see():
    """Evaluation, back in grey levels: three equal channels, within a level of ours."""
    from cxr_dist.bench import notebooks

    data = png(noise(5, 300))
    found = notebooks.load(data, notebooks.evaluation_transform(64)).numpy()
    levels = (found * np.reshape(notebooks.STD, (3, 1, 1)) + np.reshape(notebooks.MEAN, (3, 1, 1))) * 255
    assert np.abs(levels - images.to_grey(data, 64)).max() <= 1
    trained = notebooks.load(data, notebooks.training_transform(64))
    assert (tuple(trained.shape), str(trained.dtype)) == ((3, 64, 64), "torch.float32")


def refused(job: ModuleType, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run_job(job.main, description="bench", extra=job.flags, argv=list(argv))
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.strip()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["decode", "--repeat", "3"], "error: unknown key repeat: did you mean repeats?"),
        (["decode", "--repeats", "0"], "error: --repeats: found 0, expected 1 or more"),
        (["decode", "--num_images", "-1"], "error: --num_images: found -1, expected 0 or more"),
        (["decode", "--chart", "/none/x.png"], "error: --chart: found no folder /none; make it or give another"),
        (
            ["decode", "--images", "/none"],
            "error: /none: found no .png file, expected a folder or prefix of PNG images",
        ),
        (["simulate", "--max_images", "5"], "error: --max_images: found 5, expected 100000 or more"),
        (["simulate", "--network_gbit", "0"], "error: --network_gbit: found 0.0, expected more than 0"),
        (
            ["simulate", "--rank_images_per_s", "100", "0"],
            "error: --rank_images_per_s: found (100.0, 0.0), expected more than 0",
        ),
        (["page"], "error: page: found no --results or no --page, expected the JSON to show and the file to write"),
        (
            ["chart"],
            "error: chart: found no --results or no --chart, expected the JSON to draw and the file to write",
        ),
    ],
)
def test_a_wrong_flag_is_one_sentence(job, capsys, argv, message):
    assert refused(job, capsys, *argv) == message


def test_wrong_stages_and_results_are_named(job, capsys, tmp_path):
    assert "invalid choice: 'deco' (choose from 'decode', 'stream'" in refused(job, capsys, "deco")
    (tmp_path / "x.json").write_text("{}")
    given = ("--results", str(tmp_path / "x.json"), "--chart", str(tmp_path / "x.png"))
    assert refused(job, capsys, "chart", *given) == "error: results: found format None, expected 1; run the bench again"
    (tmp_path / "x.json").unlink()
    assert refused(job, capsys, "chart", *given).startswith("error: --results: found no JSON at")


def test_all_stages_in_order_one_table_each_and_the_result_can_be_drawn(job, monkeypatch, capsys, tmp_path):
    def stage(name: str) -> SimpleNamespace:
        row = Row(stage=name.rpartition(".")[2], name="x", images=1, images_per_s=2.0)
        return SimpleNamespace(run=lambda given: [dataclasses.replace(row, images=given.count(7))])

    written = tmp_path / "bench.json"
    with monkeypatch.context() as patch:
        patch.setattr(job.importlib, "import_module", stage)
        argv = ["all", "--num_images", "5", "--json", str(written)]
        with pytest.raises(SystemExit) as caught:
            run_job(job.main, description="", extra=job.flags, argv=argv)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [row["stage"] for row in result["rows"]] == ["decode", "stream", "cache", "step", "epoch"]
    assert [row.images for row in from_json(result)] == [5] * 5
    assert result["options"] == {
        "stage": "all", "images": "", "num_images": 5, "peers": False,
        "cpus": job.os.cpu_count(), "repeats": 5, "seed": 0,
    }  # fmt: skip
    assert out.count("| x ") == 5
    assert json.loads(written.read_text()) == result
    argv = ["chart", "--results", str(written), "--chart", str(tmp_path / "bench.svg")]
    with pytest.raises(SystemExit) as caught:
        run_job(job.main, description="", extra=job.flags, argv=argv)
    assert caught.value.code == 0
    assert "<svg" in (tmp_path / "bench.svg").read_text()


def test_numbers_have_three_digits():
    shown = {
        None: "",
        0.0123456: "0.0123",
        9.994: "9.99",
        9.996: "10.0",
        99.94: "99.9",
        99.96: "100",
        123456.7: "123,457",
    }
    assert {value: report._number(value) for value in shown} == shown


def test_options_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="--cpus: found 0, expected 1 or more"):
        bench_options.checked(options(tmp_path, cpus=0))
