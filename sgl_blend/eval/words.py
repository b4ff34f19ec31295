"""The fixed word lists that the tasks are written in, and that the shipped tokenizer knows.

No word is in two lists (``tests/eval/test_tasks.py`` holds them to it), so a word's role can be
read off the word itself.
"""

from __future__ import annotations

NAMES: tuple[str, ...] = tuple(
    """
    Ada Alma Arlo Asa Bela Bruno Carla Cato Cleo Cora Dara Dina Edda Elio Elsa Emil Enzo Esme Ezra
    Fabio Fay Finn Flora Freya Gael Gina Greta Gus Hana Hugo Ida Igor Ines Iris Ivo Jana Jonas
    Juno Kai Karl Kira Lara Lars Lena Leo Lina Lotte Luca Lulu Maja Mara Marco Mila Mira Nadia
    Nico Nina Noor Nora Odo Olga Orla Oscar Otis Otto Paco Petra Pia Quinn Rafa Remy Rhea Rita
    Rosa Ruth Sami Sara Selma Silas Sofia Sven Tara Tess Theo Tilda Timo Tove Ugo Una Vera Vito
    Wanda Wim Xenia Yara Yuri Zara Zeno
    """.split()
)

SYMBOLS: tuple[str, ...] = tuple(
    """
    bax bim bov cug daf dep dov dulm fep fim fonk gav gew gox hib hud jeb jom juv kip kez kol lar
    lod luf mip mog muv nak nep nuz pag pim poz quib quo rax rill sev sib sov tav tep tud vam vip
    vog wex wob yam yig zeb zif zul
    """.split()
)

CLASSES: dict[str, tuple[str, ...]] = {
    "metal": ("copper", "silver", "iron", "tin", "gold", "zinc", "brass", "nickel"),
    "fruit": ("apple", "plum", "pear", "cherry", "lemon", "fig", "grape", "melon"),
    "animal": ("otter", "fox", "heron", "badger", "hare", "owl", "seal", "goat"),
    "tool": ("hammer", "chisel", "saw", "rake", "spade", "axe", "pliers", "drill"),
    "cloth": ("silk", "linen", "wool", "cotton", "velvet", "satin", "denim", "felt"),
    "wood": ("oak", "pine", "birch", "maple", "cedar", "elm", "walnut", "ash"),
}
"""Kind of thing -> the things. The kind is the lossy check word that ends a fact."""

CLASS_OF: dict[str, str] = {v: c for c, values in CLASSES.items() for v in values}
VALUES: tuple[str, ...] = tuple(CLASS_OF)

TITLES: tuple[str, ...] = tuple(
    """
    Agate Amber Basalt Beryl Chalk Cobalt Coral Flint Garnet Granite Jade Jasper Marble Mica Onyx
    Opal Pearl Quartz Ruby Shale Slate Topaz Umber Zircon
    """.split()
)

ADJECTIVES: tuple[str, ...] = tuple(
    """
    old quiet narrow bright empty grey busy small wide cold steep dusty green hollow distant warm
    """.split()
)
NOUNS: tuple[str, ...] = tuple(
    """
    harbor market tower garden mill bridge station chapel ferry window lantern clock cart fence
    kitchen stable library orchard cellar bakery road boat gate barn
    """.split()
)
VERBS: tuple[str, ...] = tuple(
    "rested stood waited opened closed creaked shone faded leaned rattled settled woke".split()
)
PLACES: tuple[str, ...] = tuple(
    "river hill forest square valley shore meadow canal castle field lake wall".split()
)
PREPOSITIONS: tuple[str, ...] = ("near", "behind", "beyond", "above", "beside", "under")
TIMES: tuple[str, ...] = tuple(
    "winter spring summer autumn January March April June August October".split()
)

SYSTEM_SENTENCES: tuple[str, ...] = (
    "You answer from the records.",
    "Read every document before you answer.",
    "Keep the answer short.",
    "Use the legends to read the records.",
    "You are a careful clerk.",
    "Be brief and exact.",
    "All records below are true.",
    "You help people who look for things.",
    "Say only the name of the thing.",
    "The documents come in no special order.",
)

MARKS: tuple[str, ...] = (".", ":", ",")
GRAMMAR: tuple[str, ...] = tuple(
    "Legend Record means owns The the in Question what belongs to and".split()
)


def vocabulary() -> tuple[str, ...]:
    """Every word that a task can hold, in a fixed order, without repeats."""
    system = tuple(w.rstrip(".") for s in SYSTEM_SENTENCES for w in s.split())
    lists = (MARKS, GRAMMAR, NAMES, SYMBOLS, VALUES, tuple(CLASSES), TITLES, ADJECTIVES, NOUNS)
    rest = (VERBS, PLACES, PREPOSITIONS, TIMES, system)
    return tuple(dict.fromkeys(word for words in lists + rest for word in words))
