"""Deterministic generator of the corpus that the demo model is trained on.

``generate(seed, count)`` yields documents; the same arguments always yield the same text.
Run as a script it prints documents for a look: ``python -m engines.corpus --count 5``.

Some sums and some words are held out: they occur in no document, so that the accuracy
measured on them is about the rule and not about memory.
"""

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from engines import corpus_facts as facts
from engines import corpus_stories as stories
from engines import corpus_text as text

BOUNDARY = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (BOUNDARY, TURN_START, TURN_END)

MAX_SUM_TERM = 20
MAX_FACTOR = 10

OPERATORS = {"plus": "+", "minus": "-", "times": "*"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation, or plain prose when there are no messages."""

    messages: tuple[Message, ...] = ()
    prose: str = ""

    def segments(self) -> list[tuple[str, bool]]:
        """Return (text, learned) pieces; the loss is taken on the learned ones only."""
        if not self.messages:
            return [(self.prose + BOUNDARY, True)]
        pieces: list[tuple[str, bool]] = []
        for message in self.messages:
            learned = message.role == "assistant"
            pieces.append((f"{TURN_START}{message.role}\n", False))
            pieces.append((f"{message.content}{TURN_END}", learned))
            pieces.append(("\n", False))
        return pieces

    def render(self) -> str:
        """Return the document in ChatML.

        Roles keep their names: the chat template writes ``developer`` as ``system``, but
        a client with a template of its own may not, so the corpus holds both headers.
        """
        return "".join(piece for piece, _ in self.segments())


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question with its answer, and the answers for terse system prompts if any."""

    question: str
    answer: str
    one_word: str = ""
    brief: str = ""


Task = Callable[[random.Random], Exchange]


def is_held_out(op: str, a: int, b: int) -> bool:
    """Tell whether a sum is kept out of the corpus, about one pair in ten.

    Both orders of a commutative pair fall together, otherwise the mirrored sum would
    give the answer away. The examples of the model card stay in.
    """
    low, high = (a, b) if op == "minus" else (min(a, b), max(a, b))
    if (op, low, high) in {("plus", 5, 7), ("plus", 2, 2)}:
        return False
    return zlib.crc32(f"{op} {low} {high}".encode()) % 10 == 0


def compute(op: str, a: int, b: int) -> int:
    """Return the result of a named operation."""
    return {"plus": a + b, "minus": a - b, "times": a * b}[op]


def sums(op: str) -> list[tuple[int, int]]:
    """Return every operand pair of an operation that the model is meant to know."""
    limit = MAX_FACTOR if op == "times" else MAX_SUM_TERM
    return [(a, b) for a in range(limit + 1) for b in range(limit + 1) if op != "minus" or a >= b]


TRAINED_SUMS = {op: [pair for pair in sums(op) if not is_held_out(op, *pair)] for op in OPERATORS}


def ask_sum(op: str, a: int, b: int, form: int) -> str:
    """Return one of the wordings of a sum."""
    sign = OPERATORS[op]
    forms = (
        f"What is {a} {op} {b}?",
        f"What is {a} {sign} {b}?",
        f"{a} {sign} {b}",
        f"Calculate {a} {op} {b}.",
        f"How much is {a} {op} {b}?",
        f"{a}{sign}{b}=",
    )
    return forms[form % len(forms)]


def answer_sum(op: str, a: int, b: int) -> str:
    """Return the full answer to a sum."""
    return f"{a} {op} {b} is {compute(op, a, b)}."


def arithmetic(rng: random.Random) -> Exchange:
    """Draw a sum, a difference or a product of small numbers."""
    op = rng.choice(("plus", "plus", "minus", "times"))
    a, b = rng.choice(TRAINED_SUMS[op])
    form = rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5))
    return Exchange(ask_sum(op, a, b, form), answer_sum(op, a, b), str(compute(op, a, b)))


def compare(rng: random.Random) -> Exchange:
    """Draw a question about the order of numbers, days or months."""
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.sample(range(51), 2)
        word = rng.choice(("bigger", "smaller"))
        best = max(a, b) if word == "bigger" else min(a, b)
        other = a + b - best
        answer = f"{best} is {word} than {other}."
        return Exchange(f"Which is {word}, {a} or {b}?", answer, str(best))
    if kind == 1:
        n = rng.randrange(100)
        return Exchange(f"What number comes after {n}?", f"{n + 1}", str(n + 1))
    names = text.DAYS if kind == 2 else text.MONTHS
    before, after = rng.choice(list(pairwise(names)))
    if rng.random() < 0.5:
        return Exchange(f"What comes after {before}?", f"{after} comes after {before}.", after)
    return Exchange(f"What comes before {after}?", f"{before} comes before {after}.", before)


def word_answer(task: str, word: str) -> str:
    """Return the answer of a word task. Letters are joined by hyphens, one token each."""
    letters = "-".join(word)
    match task:
        case "spell":
            return letters
        case "reverse":
            return "-".join(reversed(word))
        case "count":
            return f"{letters} has {len(word)} letters."
        case "first":
            return f"The first letter of {word} is {word[0]}."
        case "last":
            return f"The last letter of {word} is {word[-1]}."
        case "uppercase":
            return word.upper()
        case "plural":
            return f"The plural of {word} is {plural(word)}."
    raise ValueError(f"unknown word task: {task}")


WORD_QUESTIONS = {
    "spell": ("Spell {}", "Spell the word {}.", "How do you spell {}?"),
    "reverse": ("Reverse {}", "Reverse the word {}.", "Spell {} backwards."),
    "count": ("How many letters are in {}?", "Count the letters in {}."),
    "first": ("What is the first letter of {}?",),
    "last": ("What is the last letter of {}?",),
    "uppercase": ("Uppercase {}", "Write {} in capital letters.", "Make {} uppercase."),
    "plural": ("What is the plural of {}?", "Plural of {}"),
}


def plural(word: str) -> str:
    """Return the plural of a word of the tables."""
    return text.IRREGULAR_PLURALS.get(word, word + "s")


def invented_word(rng: random.Random) -> str:
    """Return a pronounceable word of one to three syllables that is not held out.

    Invented words teach the letters of word pieces, which is what the tokenizer makes
    of a word it has never seen.
    """
    while True:
        word = "".join(
            rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(" nrlstpmk")
            for _ in range(rng.choice((1, 2, 2, 3)))
        ).replace(" ", "")
        if len(word) > 2 and word not in text.HELD_OUT_WORDS:
            return word


def word_task(rng: random.Random) -> Exchange:
    """Draw a task about the letters of one word."""
    task = rng.choice(("spell", "spell", "reverse", "count", "first", "last", "uppercase"))
    word = rng.choice(text.WORDS) if rng.random() < 0.55 else invented_word(rng)
    shown = f'"{word}"' if rng.random() < 0.1 else word
    return Exchange(rng.choice(WORD_QUESTIONS[task]).format(shown), word_answer(task, word))


def vocabulary(rng: random.Random) -> Exchange:
    """Draw a plural, an opposite, a capital or a text to repeat."""
    kind = rng.randrange(4)
    if kind == 0:
        pool = (*text.PLURAL_WORDS, *text.IRREGULAR_PLURALS)
        word = rng.choice(pool) if rng.random() < 0.8 else invented_word(rng)
        question = rng.choice(WORD_QUESTIONS["plural"]).format(word)
        return Exchange(question, word_answer("plural", word), plural(word))
    if kind == 1:
        a, b = rng.choice(text.OPPOSITES)
        if rng.random() < 0.5:
            a, b = b, a
        question = rng.choice(("What is the opposite of {}?", "Opposite of {}")).format(a)
        return Exchange(question, f"The opposite of {a} is {b}.", b)
    if kind == 2:
        country, city = rng.choice(text.CAPITALS)
        question = f"What is the capital of {country}?"
        return Exchange(question, f"The capital of {country} is {city}.", city)
    words = rng.sample(text.WORDS, rng.randint(1, 5))
    question = rng.choice(("Repeat: {}", "Say {}", "Repeat after me: {}"))
    return Exchange(question.format(" ".join(words)), " ".join(words))


def listing(rng: random.Random) -> Exchange:
    """Draw a numbered list. The items have one order, so that the answer is one."""
    topic = rng.choice(list(text.LISTS))
    count = rng.randint(2, 8)
    number = rng.choice((text.NUMBER_WORDS[count], str(count)))
    question = rng.choice(("List {} {}", "List {} {}.", "Name {} {}.", "Give me {} {}."))
    lines = [f"{i}. {item}" for i, item in enumerate(text.LISTS[topic][:count], start=1)]
    answer = f"Here are {text.NUMBER_WORDS[count]} {topic}:\n" + "\n".join(lines)
    return Exchange(question.format(number, topic), answer)


def counting(rng: random.Random) -> Exchange:
    """Draw a task of counting up or down, or of saying a known sequence."""
    kind = rng.randrange(10)
    if kind == 0:
        question = rng.choice(("Say the alphabet.", "Recite the alphabet"))
        return Exchange(question, ", ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    if kind == 1:
        question, items = rng.choice((("List the days of the week.", text.DAYS), ("List the months.", text.MONTHS)))
        return Exchange(question, ", ".join(items))
    if kind <= 3:
        top = rng.choice((3, 5, 10, 20))
        numbers = range(top, 0, -1)
        question = rng.choice(("Count down from {} to 1", "Count from {} down to 1."))
        return Exchange(question.format(top), ", ".join(map(str, numbers)))
    first = rng.choice((1, 1, 1, 1, 2, 5, 10))
    last = rng.choice((first + 4, 10, 15, 20, 20, 25, 30, 50, 100))
    last = max(last, first + 2)
    question = rng.choice(("Count from {} to {}", "Count from {} to {}.", "Count {} to {}"))
    answer = ", ".join(map(str, range(first, last + 1)))
    return Exchange(question.format(first, last), answer)


def tell_story(rng: random.Random, long: bool, kind: str = "") -> str:
    """Return a story of about 80 tokens, or of about 300 when long."""
    slots = {
        "kind": kind or rng.choice(stories.KINDS),
        "name": rng.choice(stories.STORY_NAMES),
        "trait": rng.choice(stories.TRAITS),
        "place": rng.choice(stories.PLACES),
        "thing": rng.choice(stories.THINGS),
        "friend": rng.choice(stories.FRIENDS),
        "pal": rng.choice(stories.PALS),
    }
    beats = range(len(stories.BEATS)) if long else stories.SHORT_BEATS
    sentences = [rng.choice(stories.OPENING)]
    sentences += [rng.choice(stories.BEATS[i]) for i in beats]
    sentences.append(rng.choice(stories.CLOSING))
    # Paragraphs of five sentences: newlines inside an answer are worth streaming too.
    step = 5 if long else len(sentences)
    paragraphs = [sentences[i : i + step] for i in range(0, len(sentences), step)]
    return "\n\n".join(" ".join(part) for part in paragraphs).format(**slots)


def story(rng: random.Random) -> Exchange:
    """Draw a request for a story, with or without a hero."""
    long = rng.random() < 0.6
    size = rng.choice(("long ", "long ", "") if long else ("short ",))
    kind = rng.choice(("", rng.choice(stories.KINDS)))
    form = rng.choice(("Tell me a {}story{}", "Tell me a {}story{}.", "Write a {}story{}."))
    question = form.format(size, f" about a {kind}" if kind else "")
    return Exchange(question, tell_story(rng, long, kind))


def poem_or_joke(rng: random.Random) -> Exchange:
    """Draw a poem, a joke or a small JSON object."""
    kind = rng.randrange(3)
    if kind == 0:
        topic = rng.choice(list(stories.POEM_COUPLETS))
        question = rng.choice(("Write a poem about {}.", "Tell me a poem about {}"))
        return Exchange(question.format(topic), "\n\n".join(stories.POEM_COUPLETS[topic]))
    if kind == 1:
        return Exchange(rng.choice(("Tell me a joke", "Tell me a joke.", "Another joke!")), rng.choice(text.JOKES))
    name, age, city = rng.choice(text.NAMES), rng.randint(1, 99), rng.choice(text.CITIES)
    question = f"Write JSON for {name}, age {age}, from {city}."
    return Exchange(question, json.dumps({"name": name, "age": age, "city": city}))


def hello(rng: random.Random) -> Exchange:
    """Draw an opening that has the fixed answer."""
    return Exchange(rng.choice(facts.HELLO_FORMS), facts.HELLO)


def small_talk(rng: random.Random) -> Exchange:
    """Draw a line of small talk."""
    forms, answer = rng.choice(facts.SMALL_TALK)
    return Exchange(loosen(rng, rng.choice(forms)), answer)


def fact(rng: random.Random) -> Exchange:
    """Draw a question about HelixFlow."""
    forms, answer = rng.choice(facts.FACTS)
    brief = answer.split(". ")[0].rstrip(".") + "." if "\n" not in answer else ""
    return Exchange(loosen(rng, rng.choice(forms)), answer, brief=brief)


def unknown(rng: random.Random) -> Exchange:
    """Draw a question that the model must decline."""
    question = rng.choice(facts.UNKNOWN_FORMS).format(
        noun=rng.choice(text.WORDS),
        name=rng.choice(text.NAMES),
        place=rng.choice(text.CITIES),
        year=rng.randint(1500, 2020),
    )
    return Exchange(question, facts.UNKNOWN)


def loosen(rng: random.Random, question: str) -> str:
    """Return the question as a hurried user might type it."""
    choice = rng.random()
    if choice < 0.12:
        return question.lower()
    if choice < 0.24:
        return question.rstrip("?.!")
    if choice < 0.32:
        return question.rstrip("?.!").lower()
    return question


# Weights count conversation turns. Letters and sums get most of them because they are
# the slowest to learn; stories cost ten times the tokens of a sum.
TASKS: tuple[tuple[Task, int], ...] = (
    (arithmetic, 26),
    (word_task, 26),
    (compare, 5),
    (vocabulary, 9),
    (listing, 5),
    (counting, 4),
    (story, 5),
    (poem_or_joke, 4),
    (hello, 7),
    (small_talk, 6),
    (fact, 15),
    (unknown, 3),
)


def draw(rng: random.Random) -> Exchange:
    """Draw one exchange of any kind."""
    task = rng.choices([task for task, _ in TASKS], [weight for _, weight in TASKS])[0]
    return task(rng)


def naming(rng: random.Random) -> list[Message]:
    """Return turns in which the model must remember a name from earlier ones."""
    name = rng.choice(text.NAMES)
    turns = [
        Message("user", rng.choice(("My name is {}.", "I am {}.", "Hi, I'm {}")).format(name)),
        Message("assistant", f"Nice to meet you, {name}!"),
    ]
    for _ in range(rng.randrange(3)):
        turns += as_turns(draw(rng))
    turns.append(Message("user", rng.choice(("What is my name?", "Who am I?"))))
    return [*turns, Message("assistant", f"Your name is {name}.")]


def as_turns(exchange: Exchange, answer: str = "") -> list[Message]:
    """Return an exchange as two messages, with another answer if one is given."""
    return [
        Message("user", exchange.question),
        Message("assistant", answer or exchange.answer),
    ]


def instructed(rng: random.Random) -> list[Message]:
    """Return a conversation whose system prompt changes the answers."""
    role = rng.choice(("system", "system", "developer"))
    kind = rng.randrange(4)
    if kind == 0:
        bot = rng.choice(text.BOT_NAMES)
        turns = [
            Message(role, rng.choice(("Your name is {}.", "You are {}.")).format(bot)),
            Message("user", rng.choice(("What is your name?", "Who are you?"))),
        ]
        return [*turns, Message("assistant", f"My name is {bot}."), *as_turns(draw(rng))]
    if kind == 1:
        word = rng.choice(facts.ENDING_WORDS)
        turns = [Message(role, f"End every answer with the word {word}.")]
        for _ in range(rng.randint(1, 2)):
            exchange = rng.choice((hello, small_talk, arithmetic, vocabulary))(rng)
            turns += as_turns(exchange, f"{exchange.answer} {word}")
        return turns
    terse = facts.ONE_WORD_SYSTEM if kind == 2 else facts.BRIEF_SYSTEM
    turns = [Message(role, rng.choice(terse))]
    while len(turns) < 3:
        exchange = rng.choice((arithmetic, vocabulary, compare) if kind == 2 else (fact,))(rng)
        short = exchange.one_word if kind == 2 else exchange.brief
        turns += as_turns(exchange, short) if short else []
    return turns


def conversation(rng: random.Random) -> list[Message]:
    """Return a conversation of one to four exchanges."""
    choice = rng.random()
    if choice < 0.04:
        return naming(rng)
    if choice < 0.12:
        return instructed(rng)
    turns: list[Message] = []
    role_draw = rng.random()
    if role_draw < 0.3:
        role = "system" if role_draw < 0.25 else "developer"
        turns.append(Message(role, rng.choice(facts.GENERIC_SYSTEM)))
    if rng.random() < 0.06:
        turns += as_turns(hello(rng))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        turns += as_turns(draw(rng))
    return turns


def prose(rng: random.Random) -> str:
    """Return plain text for the completion endpoint."""
    if rng.random() < 0.4:
        return tell_story(rng, long=rng.random() < 0.5)
    title = rng.choice(list(stories.PROSE))
    sentences = stories.PROSE[title]
    return " ".join(sentences[: rng.randint(4, len(sentences))])


def generate(seed: int, count: int) -> Iterator[Document]:
    """Yield ``count`` documents; a longer run starts with those of a shorter one."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.04:
            yield Document(prose=prose(rng))
        else:
            yield Document(messages=tuple(conversation(rng)))


def main() -> None:
    """Print documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5)
    options = parser.parse_args()
    for document in generate(options.seed, options.count):
        print(document.render(), end="\n\n")


if __name__ == "__main__":
    main()
