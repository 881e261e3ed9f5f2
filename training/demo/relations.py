"""The prompts of the training: completions about "this country".

The phrasings of the relations are the package's own, since paraphrases are made of them too.
"""

from mmlens.demo.phrasings import PHRASINGS as PHRASINGS

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
