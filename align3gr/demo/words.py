"""The words of the demo's items: titles and descriptions written from their attributes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THEMES_PER_GENRE = 5
GENRES = {
    "mystery": ("lighthouses", "forgeries", "missing letters", "night trains", "small towns"),
    "adventure": ("deserts", "polar expeditions", "lost maps", "mountain passes", "river journeys"),
    "cooking": ("sourdough", "street food", "fermentation", "family recipes", "spice routes"),
    "science": ("deep oceans", "exoplanets", "microbes", "volcanoes", "the human brain"),
    "music": ("jazz clubs", "choirs", "synthesizers", "folk fiddles", "opera houses"),
    "history": ("medieval guilds", "silk roads", "shipwrecks", "revolutions", "ancient libraries"),
    "romance": ("summer islands", "second chances", "rival bakers", "pen friends", "city rooftops"),
    "sport": ("cycling tours", "chess boxing", "climbing", "marathon running", "open-water swimming"),
    "fantasy": ("dragons", "hidden doors", "talking rivers", "apprentice mages", "clockwork cities"),
    "nature": ("wolves", "old forests", "bird migration", "coral reefs", "mushrooms"),
    "craft": ("woodworking", "pottery", "hand weaving", "bookbinding", "glass blowing"),
    "comedy": ("office life", "clumsy detectives", "wedding chaos", "time loops", "neighbours"),
}
MOODS = ("quiet", "tense", "warm", "dark", "playful", "epic", "melancholy", "bright")
_FIRST = ("Ada", "Bruno", "Chidi", "Dana", "Eero", "Farah", "Goran", "Hana", "Ivo", "Juno", "Kofi", "Lena")
_LAST = ("Abel", "Brandt", "Castro", "Dimov", "Egede", "Ferrer", "Grau", "Hoshi", "Ilves", "Jansen")
MAKERS = tuple(f"{first} {last}" for first in _FIRST for last in _LAST)
_NOUNS = (
    "Harbour",
    "Lantern",
    "Orchard",
    "Compass",
    "Winter",
    "Mirror",
    "Garden",
    "Signal",
    "Bridge",
    "Ember",
)
_ADJECTIVES = (
    "Amber",
    "Silent",
    "Distant",
    "Crooked",
    "Golden",
    "Hidden",
    "Restless",
    "Paper",
    "Salt",
    "Blue",
)


@dataclass(frozen=True)
class DemoItem:
    """One item as the catalogue knows it."""

    item_id: str
    title: str
    text: str
    genre: str
    theme: str
    mood: str
    maker: str


def write_items(
    theme: NDArray[np.int64], mood: NDArray[np.int64], maker: NDArray[np.int64], random: np.random.Generator
) -> tuple[DemoItem, ...]:
    """One item for each row of the three attribute arrays [items]."""
    themes = [(genre, name) for genre, names in GENRES.items() for name in names]
    adjectives = random.integers(len(_ADJECTIVES), size=len(theme))
    nouns = random.integers(len(_NOUNS), size=len(theme))
    items = []
    for row in range(len(theme)):
        genre, about = themes[int(theme[row])]
        feeling, by = MOODS[int(mood[row])], MAKERS[int(maker[row])]
        title = f"The {_ADJECTIVES[int(adjectives[row])]} {_NOUNS[int(nouns[row])]}"
        text = f"A {feeling} {genre} piece about {about}, by {by}."
        items.append(DemoItem(f"item-{row:05d}", title, text, genre, about, feeling, by))
    return tuple(items)
