"""The page's arithmetic, by hand."""

import json
from pathlib import Path

import pytest

from ktray.accounting.prices import hourly_price
from ktray.errors import KtrayError
from ktray.jobs.bench import web_scale
from ktray.jobs.bench.web_scale import Encoder, main, steps, table

TOY = Encoder("toy", 64, flops=1e9, values=1e9, dimensions=100)
ROWS = [
    {"name": "decode, crop, fingerprint", "reached": [300.0, 100.0, 200.0], "facts": {}},
    {"name": "embed, small", "reached": [50.0], "facts": {"flops_per_image": 1e6}},
    {"name": "embed, open_clip:ViT-B-32", "reached": [5.0], "facts": {"flops_per_image": 2e9}},
    {
        "name": "exact search",
        "reached": [10.0],
        "facts": {"rows": 1000, "dimensions": 512, "table_bytes_per_row": 60.0},
    },
    {
        "name": "compressed search",
        "reached": [100.0],
        "facts": {
            "rows": 1000,
            "factory": "OPQ64,IVF16,PQ64",
            "bytes_per_row": 72.0,
            "build_seconds": 2.0,
            "recall_at_100": 0.97,
        },
    },
]


def test_each_line_is_its_constant_times_the_images():
    found = {s.what: s for s in steps(ROWS, 2, 3.6e6, TOY)}
    core = hourly_price({"cores": 1, "gpus": []}, {})
    assert found["images, encoded"].result == "0 TB"
    # 200 images/s on two cores: 3.6 million take 36,000 core-seconds.
    assert found["decode, crop, fingerprint"].result == f"10 core-hours, ${10 * core:,.0f}"
    # 5 images/s of 2 GFLOP are 10 GFLOP/s: 3.6e15 FLOP take 100 hours of the machine.
    assert found["embed on this machine"].result == f"100 machine-hours, ${200 * core:,.0f}"
    assert "open_clip:ViT-B-32" in found["embed on this machine"].constant
    # 3.6e15 FLOP at 60% of 121 TFLOP/s, and 3.6e15 values of 2 bytes at 80% of 0.3 TB/s.
    spent = 3.6e15 / (0.6 * 121e12) + 7.2e15 / (0.8 * 0.3e12)
    assert found["embed on L4"].result == f"{spent / 3600:,.0f} GPU-hours, ${spent / 3600 * 0.805:,.0f}"
    assert found["embed on L4"].source == found["embed on H200"].source == "roofline"
    assert found["embeddings"].result == "0.00 TB"
    assert found["uris, hashes, captions"].result == "0 GB"
    # 10 queries/s x 1,000 rows x 512 x 2 = 10.24 MFLOP/s; 19,210 queries x 3.6e6 x 100 x 2 FLOP.
    hours = 19_210 * 3.6e6 * 200 / 10.24e6 / 3600
    assert found["exact search, 19,210 queries"].result.startswith(f"{hours:,.0f} machine-hours")
    assert found["build it (train, fill, merge, measure)"].result.startswith("2 machine-hours")
    assert found["compressed search, a query"].constant.startswith("10.0 ms")
    assert table(list(found.values()), 3.6e6).splitlines()[0] == "| for 3,600,000 images | constant | | takes |"


def test_the_speed_of_the_table_comes_before_the_roofline():
    encoder = Encoder("timm:vit_large_patch14_dinov2", 224, 162.02e9, 1e9, 1024)
    found = {s.what: s for s in steps(ROWS, 2, 1e9, encoder)}
    hours = 1e9 / 2308 / 3600
    assert found["embed on H200"].result == f"{hours:,.0f} GPU-hours, ${hours * 7.91:,.0f}"
    assert found["embed on H200"].source == "measured"
    assert found["embed on H200"].constant.startswith("2,308 images/s")
    assert found["embed on H100"].source == "roofline"


def run_folder(root, rows, cpu="some", cores=2):
    root.mkdir()
    (root / "result.json").write_text(json.dumps({"rows": rows, "device": {"cpu": cpu, "cores": cores}}))
    return str(root)


def test_runs_of_single_benches_count_together(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(Encoder, "of", lambda name, side: asked.append((name, side)) or TOY)
    parts = [run_folder(tmp_path / str(i), part) for i, part in enumerate((ROWS[:1], ROWS[1:3], ROWS[3:]))]
    main([*parts, "3.6e6", "timm:vit_tiny_patch16_224", "64"])
    assert asked == [("timm:vit_tiny_patch16_224", 64)]
    assert capsys.readouterr().out == table(steps(ROWS, 2, 3.6e6, TOY), 3.6e6) + "\n"
    with pytest.raises(KtrayError, match="no figure for 'exact search'"):
        main(parts[:2])
    with pytest.raises(KtrayError, match="2 machines"):
        main([*parts, run_folder(tmp_path / "other", ROWS, "another")])


def test_the_page_has_what_gpus_take_now():
    page = (Path(__file__).parents[3] / "docs" / "measured" / "web-scale.md").read_text(encoding="utf-8")
    found = {s.what: s for s in steps(ROWS, 2, web_scale.IMAGES, Encoder.of(web_scale.ENCODER, web_scale.SIDE))}
    for gpu in web_scale.GPUS:
        row = found[f"embed on {gpu}"]
        assert f"| {row.what} | {row.constant} | {row.source} | {row.result} |" in page
