import json
import random

import numpy as np
from sklearn.metrics import confusion_matrix, f1_score

GOOD = ["I love it", "Great sound and a great price.", "Works perfectly, very happy"]
BAD = ["Terrible, it broke", "Awful noise. I hate it", "A waste of money and a bad seller"]


def test_the_benchmark_reports_agreement_on_users_it_was_not_fitted_to(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import rater

    pick = random.Random(5)
    with (tmp_path / "Shop_5.json").open("w") as out:
        for n in range(240):
            stars = pick.choice([1, 5])
            words = " ".join(pick.choice(GOOD if stars == 5 else BAD) for _ in range(3))
            facts = {"reviewerID": f"u{n % 80}", "asin": f"a{n % 9}", "overall": stars, "reviewText": words}
            out.write(json.dumps(facts | {"unixReviewTime": 1_400_000_000 + n}) + "\n")
    facts = rater.measure(tmp_path, None, "classifier", None)
    assert facts["training"] + facts["held_out"] == facts["reviews"] == 240
    for name in ("lexicon", "words"):
        assert facts["rows"][name]["level_accuracy"] > 0.95
        assert np.sum(facts["rows"][name]["confusion"]) == facts["held_out"]
    assert list(facts["bounds"]) == sorted(facts["bounds"])


def test_its_figures_are_scikit_learns(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import rater

    random = np.random.default_rng(1)
    given, rated = random.integers(1, 6, 500), random.integers(1, 6, 500)
    assert np.isclose(rater.macro_f1(given, rated, rater.STARS), f1_score(given, rated, average="macro"))
    counts = np.array(rater.confusion(given, rated, rater.STARS))
    np.testing.assert_array_equal(counts[:, :5], confusion_matrix(given, rated))
    assert not counts[:, 5].any()
