import pytest


@pytest.mark.parametrize("users", [1, 60])
def test_the_benchmark_compares_equal_rows_of_a_log_as_large_as_asked_for(tmp_path, monkeypatch, users):
    monkeypatch.syspath_prepend("benchmarks")
    import rebuild

    folder = tmp_path / "log"
    rebuild.make_log(folder, 3_000, users, items=3_000)
    built = rebuild.build(folder)
    assert built["samples"]["easy"] > 100
    assert built["samples"]["hard"] > 100
    (dataset,) = (folder / "datasets").iterdir()
    assert rebuild.PreferenceDataset.open(dataset).manifest.rows == 3_000
    assert rebuild.build_with_pandas(folder)["identical"]
