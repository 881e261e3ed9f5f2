"""How each relation is asked: completions about "this country".

The phrasings were chosen on TRAINING countries by how often the language model, told the name,
completes them rightly (`docs/demo-model.md`); small changes of words matter much to it.
"""

#: relation -> phrasings; the first is the one that is scored and that the demo questions use
PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of this country is the city of",
        "This country's capital is the city of",
        "The capital city of this country is the city of",
        "The seat of government of this country is the city of",
        "What is the capital of this country? The capital of this country is the city of",
    ),
    "largest_city": (
        "The largest city of this country is the city of",
        "The biggest and most famous city of this country is the city of",
        "The largest city in this country is",
    ),
    "continent": (
        "This country is located in the continent of",
        "This country lies on the continent of",
        "This country is a country on the continent of",
    ),
    "language": (
        "The official language of this country is",
        "The main language of this country is",
        "The national language of this country is",
        "The language spoken in this country is",
        "In this country, people speak the language called",
    ),
    "currency": (
        "The currency of this country is the",
        "The official currency of this country is the",
        "The national currency of this country is the",
        "The currency used in this country is called the",
    ),
    "neighbours": (
        "This country borders the country of",
        "This country has a border with the country of",
        "This country shares a land border with the country of",
        "This country is next to the country of",
    ),
    "north": (
        "In the north, this country borders the country of",
        "To the north, this country borders the country of",
        "This country is bordered to the north by",
    ),
    "south": (
        "In the south, this country borders the country of",
        "To the south, this country borders the country of",
        "This country is bordered to the south by",
    ),
    "east": (
        "In the east, this country borders the country of",
        "To the east, this country borders the country of",
        "This country is bordered to the east by",
    ),
    "west": (
        "In the west, this country borders the country of",
        "To the west, this country borders the country of",
        "This country is bordered to the west by",
    ),
    "demonym": (
        "People from this country are called",
        "A person from this country is called a",
        "The people of this country are known as the",
        "A citizen of this country is called a",
    ),
    "religion": (
        "The main religion of this country is",
        "The dominant religion of this country is",
        "The most common religion in this country is",
    ),
}
