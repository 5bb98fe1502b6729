"""The closed word lists every generator draws from; most of them become single tokens."""

from __future__ import annotations


def listed(text: str, separator: str | None = None) -> list[str]:
    """The words of a text."""
    return text.split(separator)


GIRLS = listed(
    "Mia Anna Lily Rose Clara Emma Nora Ella Ivy Ruby Zoe Lucy Maya Sara Olive Hazel Daisy Nina Tara Wren "
    "Alice Betty Carol Diana Elsa Fiona Grace Helen Irene Julia Karen Laura Maria Nancy Paula Rita Sonia Tina "
    "Vera Wanda "
    "Amber Bella Cora Dora Edith Flora Gina Hilda Ida Jane Kate Lena Mabel Nell Pearl Ruth Stella Thea Una Violet"
)
BOYS = listed(
    "Tom Ben Sam Max Leo Finn Jack Noah Omar Paul Hugo Ivan Adam Carl Dan Eric Fred Gus Henry Jim "
    "Albert Boris Colin David Edgar Felix George Harry Isaac Jacob Kevin Lewis Martin Nathan Oscar Peter "
    "Ralph Simon Victor Walter "
    "Arthur Bruno Caleb Derek Elias Frank Grant Howard Igor Jonas Karl Luke Miles Neil Otto Pierre Robert "
    "Seth Theo Vince"
)
NAMES = GIRLS + BOYS

ATTRIBUTES = listed("code number pin key badge ticket locker room seat phone")
COLOURS = listed("red blue green yellow orange purple pink brown black white grey gold silver violet")
ANIMALS = listed(
    "dog cat fox bear rabbit mouse horse duck owl frog lion tiger wolf goat sheep hen pig cow turtle squirrel "
    "hedgehog crow robin donkey badger otter"
)
FRUITS = listed("apple pear plum cherry lemon peach grape melon banana berry")
THINGS = listed(
    "ball kite drum book lamp hat coat bell basket ribbon boat key map stone shell ring cup candle whistle scarf "
    "bottle mirror box spoon flute blanket clock brush coin feather"
)
CITIES = listed(
    "Paris London Rome Berlin Madrid Vienna Oslo Lisbon Dublin Athens Prague Cairo Tokyo Delhi Lima Boston Chicago "
    "Denver Toronto Sydney Moscow Warsaw Geneva Naples"
)
PLACES = listed(
    "the forest|the garden|the beach|the market|the park|the school|the farm|the river|the lake|the library|"
    "the mountain|"
    "the village|the castle|the old barn|the meadow|the harbour|the bakery|the mill|the tower|the bridge",
    "|",
)
JOBS = listed("baker farmer teacher doctor sailor painter tailor miller gardener cook singer clerk")
NUMBER_WORDS = listed("zero one two three four five six seven eight nine ten eleven twelve")

WORDS = (
    COLOURS
    + ANIMALS
    + FRUITS
    + THINGS
    + JOBS
    + listed(
        "river table window garden morning winter summer paper music letter water house street bread sugar salt "
        "cloud rain snow wind star moon sun tree leaf grass flower seed road hill sand wave field door wall roof floor "
        "chair bed clay iron wood glass wool silk milk honey butter cheese soup cake tea fire smoke light shadow sound"
    )
)
