"""Tables of the results that the repository keeps."""

import json

import pytest

from benchmarks.efficacy_tables import TABLES, add_run, main, table, written


def entry(row, seed, test, right_after=None, rate=1.0):
    return {"row": row, "target_rate": rate, "seed": seed, "test": test, "right_after": right_after}


RESULTS = [
    *(entry("vanilla", seed, 0.50 + 0.02 * seed, 0.1) for seed in range(3)),
    *(entry("refit", seed, 0.61 + 0.03 * seed, 0.6) for seed in range(3)),
    {"row": "source_lr", "seed": 0, "test": 0.9},
]


def test_rows_have_mean_and_error_and_differences_are_paired():
    lines = table(RESULTS, ["vanilla"]).splitlines()
    assert "| vanilla | 1.0 | 3 | 10.0 ± 0.0 | 52.0 ± 1.2 |" in lines
    assert "| source_lr |  | 1 |  | 90.0 |" in lines
    # 11, 12 and 13: 12 with an error of 1 / sqrt(3), t = 20.8 of two degrees of freedom; right after, all are 50.
    assert "| refit | 1.0 | after the last step | 3 | +12.0 ± 0.6 | 0.002 | 0.002 |" in lines
    assert "| refit | 1.0 | right after the write | 3 | +50.0 ± 0.0 |  |  |" in lines


def test_p_is_adjusted_for_the_comparisons_of_the_table():
    more = [entry("aligned", seed, 0.50 + 0.02 * seed + gain) for seed, gain in enumerate((0.05, 0.02, 0.08))]
    lines = table([*RESULTS, *more], ["vanilla"]).splitlines()
    # Of t = 20.8 p is 0.0023, the smaller of two: doubled. Of t = 5 / sqrt(3) it is 0.1, and stays.
    assert "| refit | 1.0 | after the last step | 3 | +12.0 ± 0.6 | 0.002 | 0.005 |" in lines
    assert "| aligned | 1.0 | after the last step | 3 | +5.0 ± 1.7 | 0.1 | 0.1 |" in lines


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="other is 0 of the rows, not one: refit, source_lr, vanilla"):
        table(RESULTS, ["other"])
    with pytest.raises(ValueError, match=r"vanilla is 2 of the rows, not one: vanilla@\S+, vanilla@\S+$"):
        table([*RESULTS, entry("vanilla", 0, 0.5, rate=0.1)], ["vanilla"])


def test_a_row_at_several_rates_is_named_with_one():
    lines = table([*RESULTS, entry("vanilla", 0, 0.5, rate=0.1)], ["vanilla@1.0"]).splitlines()
    assert "| refit | 1.0 | after the last step | 3 | +12.0 ± 0.6 | 0.002 | 0.002 |" in lines


def write_run(folder):
    folder.mkdir(exist_ok=True)
    files = {
        "environment.json": [
            {
                "command": f"python -m experiments.x --run-dir {folder} --resume",
                "commit": "abc",
                "date": "2026-11-29T14:09:17+00:00",
                "versions": {"jax": "0.12"},
                "cpu_count": 2,
            }
        ],
        "config.json": {"target_rate": 0.1},
        "results.json": [
            {
                "method": "refit",
                "seed": 0,
                "target_test": 0.7,
                "target_start_test": 0.6,
                "target_start_probe": 0.6,
                "target_probe": 0.7,
                "target_validation": 0.8,
            }
        ],
        "opponents.json": [{"opponent": "source_lr", "seed": 0, "target_test": 0.9}],
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_run_is_taken_in_once_and_its_folder_is_not_named(tmp_path, capsys):
    run, file = write_run(tmp_path / "few"), tmp_path / "table.json"
    main([str(file), "--add", str(run)])
    assert "| refit | 0.1 | 1 | 60.0 | 70.0 |" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["runs"][0]["command"] == "python -m experiments.x --run-dir runs/few"
    main([str(file), "--seeds", "1", "2"])
    assert "refit" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="refit, source_lr with these seeds and rates are there already"):
        main([str(file), "--add", str(run)])
    assert json.loads(file.read_text()) == content
    (run / "opponents.json").unlink()
    assert len(add_run({"runs": [], "results": []}, run)["results"]) == 1
    write_run(run)
    more = add_run(content, run, ", again")["results"]
    assert [result["row"] for result in more] == ["refit", "source_lr", "refit, again", "source_lr, again"]


@pytest.mark.parametrize("file", sorted(TABLES.glob("*.json")), ids=lambda file: file.stem)
def test_kept_files_have_each_row_once_and_their_tables_beside_them(file):
    assert file.with_suffix(".txt").read_text() == written(file)
    results = json.loads(file.read_text())["results"]
    rows = [(result["row"], result.get("target_rate"), result["seed"]) for result in results]
    assert len(set(rows)) == len(rows)
