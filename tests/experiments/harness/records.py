"""A function that writes records for the tests of reports."""

from experiments.harness.claims import Claim, Published, Sample
from experiments.harness.record import Record


def save(folder, *, experiment="fig2", preset="paper", stand_in=False, claims=(), metrics=None):
    """Write a record of an experiment, judged by the given claims."""
    metrics = metrics or {"pearson": 0.99999}
    made = Record(
        experiment=experiment,
        preset=preset,
        config={"seed": 0},
        data={"name": "digits" if stand_in else "mnist", "stand_in": stand_in, "sha256": "5a"},
        metrics=metrics,
        claims=[claim.judge(metrics, stand_in=stand_in) for claim in claims],
        provenance={"seed": 0, "commit": "abc", "versions": {"keras": "3"}},
    )
    made.save(folder)


CLAIMS = (
    Claim("pearson", "Correlation", Published("4.1", 0.86), sample=Sample("correlation", 103),
          headline="Left: r | slope"),
    Claim("lost", "Lost | rows", None, None, 0.5, headline="rows lost"),
    Claim("slope", "Slope", Published("4.1", words="y = x"), 0.985, None,
          headline="Left: r | slope"),
    Claim("error", "Error", None, None, 1e-6),
)  # fmt: skip
METRICS = {"pearson": 0.853, "error": 2e-6, "slope": 0.5, "lost": 0.25}
