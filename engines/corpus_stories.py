"""Sentence pools for the stories, poems and plain prose of the demo corpus.

Braces name the slots of one story: {name}, {kind}, {trait}, {place}, {thing}, {friend}
and {pal} are drawn once and stay the same from the first sentence to the last.
"""

KINDS = (
    "dragon",
    "fox",
    "robot",
    "cat",
    "mouse",
    "bear",
    "rabbit",
    "bird",
    "horse",
    "pirate",
)
TRAITS = ("brave", "small", "curious", "clever", "quiet", "kind")
PLACES = (
    "a green valley",
    "a deep forest",
    "a small village",
    "an old castle",
    "a town by the sea",
    "a house on a hill",
)
THINGS = (
    "the golden key",
    "the lost book",
    "the silver bell",
    "the blue stone",
    "the magic lantern",
    "the old map",
)
FRIENDS = ("owl", "turtle", "squirrel", "dog", "hedgehog", "snail")
STORY_NAMES = ("Luna", "Milo", "Ruby", "Oscar", "Nora", "Finn", "Daisy", "Theo")
PALS = ("Otto", "Pip", "Hugo", "Bella", "Gus", "Wanda")

OPENING = ("Once upon a time, in {place}, there lived a {trait} {kind} named {name}.",)
# One beat after the other; a long story uses every beat, a short one only a few.
BEATS: tuple[tuple[str, ...], ...] = (
    (
        "Every morning {name} woke up early and looked out at the world.",
        "{name} knew every path and every tree near home.",
        "All the neighbours liked {name}, because {name} was always ready to help.",
    ),
    (
        "But there was one thing that {name} wanted more than anything: to find {thing}.",
        "More than anything, {name} dreamed of finding {thing}.",
    ),
    (
        ("One day an old traveller came by and said that {thing} was hidden far away, behind the mountains."),
        "One day the wind brought a letter, and the letter said where {thing} was hidden.",
    ),
    (
        "So {name} packed some bread and an apple, said goodbye, and set out.",
        "So {name} took a warm coat and a bottle of water and began the long journey.",
    ),
    (
        "The road was long, and it rained for three days.",
        "The first day was easy, but on the second day the path became steep and cold.",
    ),
    (
        "At last {name} came to a wide river, and there was no bridge.",
        "In the evening {name} came to a dark wood, and there was no light.",
    ),
    (
        "There {name} met a {friend} named {pal}, who was sitting alone under a tree.",
        "Just then a {friend} called {pal} came along and stopped to listen.",
    ),
    (
        ('"Where are you going?" asked {pal}. "I am looking for {thing}," said {name}. "Will you come with me?"'),
        ('"You look tired," said {pal}. "I am looking for {thing}," said {name}, "but I do not know the way."'),
    ),
    (
        "{pal} thought for a while and then smiled. Two friends can do more than one.",
        "{pal} nodded and said that nobody should travel alone.",
    ),
    (
        "Together they built a little boat from branches and leaves.",
        "Together they made a small light from moss and glowing stones.",
    ),
    (
        "The first try went wrong, and they both fell into the mud and laughed.",
        "The first try failed, but they did not give up.",
    ),
    (
        "Then they tried again, slowly and carefully, and this time it worked.",
        "The second try was better, and soon they were on the other side.",
    ),
    ("Behind the last hill they saw something shine. It was {thing}!", "And there, under a flat rock, lay {thing}!"),
    ("{name} held it up to the sun and could hardly speak.", "{name} danced with joy, and {pal} danced too."),
    (
        "But {name} did not keep it alone. They carried it home and showed it to everyone.",
        "They walked home together, and the way back seemed much shorter.",
    ),
    (
        "That night there was a great feast in {place}, with music and cake.",
        "Everyone came to hear the tale, and they sang until the moon was high.",
    ),
    (
        "{name} learned that the best treasure is a good friend.",
        "{name} learned that a long road is short when you share it.",
    ),
)
CLOSING = ("And they lived happily ever after.", "The end.")
SHORT_BEATS = (1, 6, 12, 16)

POEM_COUPLETS = {
    "the sea": (
        "The sea is wide, the sea is blue,\nit sings a quiet song for you.",
        "The waves come in, the waves go out,\nand little boats sail all about.",
    ),
    "the night": (
        ("The night is soft, the stars are bright,\nthe moon pours out its silver light."),
        ("So close your eyes and rest your head,\nthe world is sleeping in its bed."),
    ),
    "spring": (
        "The snow is gone, the grass is green,\nthe finest days that I have seen.",
        ("The birds are back, they build and sing,\nand all the garden welcomes spring."),
    ),
    "computers": (
        "A small machine upon my floor\nwill count to ten and then some more.",
        ("It reads a token, writes one too,\nand sends the answer back to you."),
    ),
}

PROSE: dict[str, tuple[str, ...]] = {
    "The morning": (
        "The morning was clear and cold.",
        "A thin mist lay over the fields.",
        "The baker opened his shop and put the warm bread in the window.",
        "Children ran down the street with their bags on their backs.",
        "Somewhere a bell rang eight times.",
        "Nobody was in a hurry.",
    ),
    "The river": (
        "The river begins high in the hills.",
        "At first it is only a thin line of water.",
        "It grows with every stream that joins it.",
        "In the valley it turns slow and broad.",
        "Farmers use its water for their fields.",
        "At the end it meets the sea.",
    ),
    "The city": (
        "The city never sleeps for long.",
        "Trains arrive before the sun comes up.",
        "Shops open, lights go on, and the streets fill with people.",
        "In the parks old men play chess under the trees.",
        "At night the windows shine like small stars.",
        "Then it all begins again.",
    ),
    "The server": (
        "The server stands in a quiet room.",
        "It has no screen and no keyboard.",
        "All day long it waits for requests and answers them one by one.",
        "When many arrive at once, it works on them together.",
        "Every answer is written into the ledger.",
        "A green light means that all is well.",
    ),
    "The garden": (
        "The garden lies behind the house.",
        "In spring the first flowers are yellow.",
        "In summer there are apples and plump berries.",
        "A cat sleeps on the warm wall.",
        "In autumn the leaves turn red and gold.",
        "In winter everything rests under the snow.",
    ),
}
