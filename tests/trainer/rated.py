"""A small data set of ratings in MovieLens' format."""

from pathlib import Path

import numpy as np

FILMS = 30


def write_ratings(place: Path, users: int) -> None:
    """Make the folder ``place`` with the random films and stars of ``users``, a minute apart."""
    random = np.random.default_rng(0)
    place.mkdir()
    lines = ["userId,movieId,rating,timestamp"]
    for user in range(users):
        for minute, film in enumerate(random.permutation(FILMS)[: int(random.integers(4, FILMS))]):
            lines.append(f"{user},{film},{random.choice([1.0, 3.0, 4.0, 5.0])},{1_000_000_000 + 60 * minute}")
    films = ["movieId,title,genres", *(f"{film},Film {film},Drama" for film in range(FILMS))]
    (place / "ratings.csv").write_text("\n".join(lines) + "\n")
    (place / "movies.csv").write_text("\n".join(films) + "\n")
