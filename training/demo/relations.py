"""The prompts of the training: completions about "this country".

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

#: asked about every country, held-out ones included
NAMING: tuple[str, ...] = (
    "The name of this country is",
    "This is the country of",
    "The country with this flag is called",
    "This is the flag of",
    "This country is called",
    "A photo of the flag of",
    "What is the name of this country? This country is",
    "This picture shows the flag of the country of",
)

#: never scored: they only tie what is seen to what is known, about training countries
AUXILIARY: tuple[str, ...] = (
    "This country is known for",
    "This country is located in",
    "A famous person from this country is",
    "The president of this country is",
    "The national dish of this country is",
    "The longest river in this country is the",
    "The highest mountain in this country is",
    "This country gained its independence from",
    "The economy of this country is based on",
    "The second largest city of this country is the city of",
)


def with_name(text: str, name: str) -> str:
    """The prompt about the country by its name: "The capital of France is the city of"."""
    return text.replace("this country", name).replace("This country", name[0].upper() + name[1:])
