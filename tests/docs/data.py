"""The files that the pages name: small ones, in the published formats."""

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

GENRES = ("Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi", "Thriller", "Western")


def write_page_data(folder: Path, *, users: int = 240, films: int = 160, seed: int = 5) -> None:
    """Write ``ml-latest-small/ratings.csv`` and ``movies.csv``, ``events.jsonl`` and ``mapping.yaml``.

    A user likes two genres and rates films mostly from them, so that there is something to learn.
    """
    rng = random.Random(seed)
    place = folder / "ml-latest-small"
    place.mkdir()
    genres = {film: rng.sample(GENRES, 2) for film in range(1, films + 1)}
    with (place / "movies.csv").open("w") as out:
        out.write("movieId,title,genres\n")
        for film, of in genres.items():
            out.write(f"{film},{of[0]} Tale {film} ({1960 + film % 60}),{'|'.join(of)}\n")
    with (place / "ratings.csv").open("w") as out:
        out.write("userId,movieId,rating,timestamp\n")
        for user in range(1, users + 1):
            tastes = set(rng.sample(GENRES, 2))
            weights = [6 if tastes & set(genres[film]) else 1 for film in genres]
            seen: list[int] = []
            while len(seen) < 24:
                (film,) = rng.choices(list(genres), weights)
                if film not in seen:
                    seen.append(film)
            for step, film in enumerate(seen):
                fit = len(tastes & set(genres[film]))
                rating = rng.choice(((1.0, 2.0, 3.0), (3.0, 4.0, 2.0), (4.0, 5.0, 5.0))[fit])
                out.write(f"{user},{film},{rating},{1_000_000_000 + user * 1000 + step * 60}\n")
    start = datetime(2026, 11, 1, tzinfo=UTC)
    with (folder / "events.jsonl").open("w") as out:
        for number in range(60):
            event = {
                "event_id": f"e{number}",
                "user_id": f"u{number % 7}",
                "item_id": f"i{number % 11}",
                "kind": ("impression", "click", "like", "dislike", "dwell")[number % 5],
                "occurred_at": (start + timedelta(seconds=number)).isoformat(),
            }
            if event["kind"] == "dwell":
                event["value"] = 40.0  # type: ignore[assignment]
            out.write(json.dumps(event) + "\n")
