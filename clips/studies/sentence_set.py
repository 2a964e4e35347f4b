"""Captions whose sentences are known, drawn from templates: what a sentence splitter is measured on.

Every kind has templates that the rules of clips/data/sentences.py may be tuned on, and others, with other
abbreviations, that are held out: they were written before the rules and are looked at as figures only.

In a template `¶` ends a sentence (a space or a line end follows), `↵` ends it by a line end, `‖` by nothing; `{pool}`
draws from POOLS.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["tuned", "held_out"]

POOLS = {
    "thing": "dog|red bicycle|bowl of noodles|wooden chair|cat|vase of tulips|small boat|lamp|old truck|loaf of bread|"
    "blue kite|guitar|laptop|bridge|stone wall|teapot|pair of shoes|cake|zebra|traffic light",
    "place": "on the table|near the window|in a park|beside a lake|under a bright sky|against a white wall|on a shelf|"
    "at the edge of a field|in front of a brick house|next to a parked car|in the middle of the street",
    "verb": "stands|rests|is shown|lies|appears|is placed|can be seen",
    "quality": "bright|calm|dark|modern|rustic|warm|festive|quiet|elegant|worn",
    "name": "Smith|Jones|Garcia|Müller|O'Brien|Chen|Lee|Brown|Rossi|Novak|King",
    "first": "Anna|John|Maria|Peter|Li|Omar|Emma|Noah|George|Sofia",
    "letter": "A|B|C|D|E|F|G|H|J|K|L|M|R|S|T|W",
    "small": "2|3|4|5|6|8|12|15|20|30",
    "year": "1885|1912|1949|1967|1985|2001|2019",
    "price": "$3.50|$25|€9.99|£1,200.00|$0.99|12.50 dollars|$5",
    "amount": "3.5|0.75|12.0|1,000.25|2.2",
    "city": "Paris|Springfield|Austin|Berlin|Kyoto|Lagos|Oslo",
    "site": "www.example.com|shop.example.org/items?id=7|https://example.com/a.html|example.co.uk|photos.example.net",
    "file": "image.jpg|photo_01.png|report.pdf|main.py|v2.0.1.zip",
    "shout": "Sale|Wow|Hurry|Happy Birthday|Welcome|Stop",
}

TEMPLATES: dict[str, dict[Part, list[str]]] = {
    "plain": {
        "tuned": [
            "A {thing} {verb} {place}.",
            "The {thing} {verb} {place}, and the light is {quality}.",
            "In the background, a {thing} {verb} {place}.",
            "It looks {quality}.",
            "There are {small} people {place}; one of them holds a {thing}.",
            "Overall, the scene is {quality} and {quality}.",
            "Is it a {thing}?¶No, it is a {thing}.",
            "What a {quality} day!¶A {thing} {verb} {place}.",
        ],
        "held_out": [
            "This image shows a {thing} that {verb} {place}.",
            "Two children play with a {thing} {place}.",
            "To the left, {first} holds a {thing}.",
            "Nothing else {verb} {place}.",
            "Light falls from above, which makes the {thing} look {quality}.",
            "Visitors walk {place}.",
            "Who painted the {thing}?¶Nobody knows.",
            "How {quality} it is!¶Leaves cover the {thing}.",
        ],
    },
    "titles": {
        "tuned": [
            "Mr. & Mrs. {name} pose with a {thing}.",
            "Dr. {name} and Prof. {name} {verb} {place}.".replace("{verb}", "talk"),
            "The sign names Mrs. {name} as the owner.",
            "St. {name}'s church {verb} {place}.",
            "A portrait of Gen. {first} {name} hangs {place}.",
            "The plate reads {first} {name} Jr. and Ms. {name}.",
            "A statue of Martin {name} Jr. {verb} {place}.",
        ],
        "held_out": [
            "Mr. and Mrs. {first} {name} cut the cake.",
            "Sen. {name} shakes hands with Gov. {name}.",
            "Messrs. {name} & {name} sit {place}.",
            "Here stands Capt. {name} with Lt. {first} {name}.",
            "Rev. {name} reads to Sgt. {name}.",
            "The book is by {first} {name}, Ph.D. and {first} {name}, M.D.",
            "A bust of Hon. {first} {name} Sr. {verb} {place}.",
        ],
    },
    "initials": {
        "tuned": [
            "A novel by J. R. R. Tolkien lies {place}.",
            "The author, {letter}. {name}, {verb} {place}.",
            "{first} {letter}. {name} signs a {thing}.",
            "The letters {letter}.{letter}. are carved into the {thing}.",
        ],
        "held_out": [
            "The cover names {letter}.{letter}. {name} and {first} {letter}. {name}.",
            "{letter}. {letter}. {name} wrote the text {place}.",
            "A poster shows Samuel {letter}. {name} {place}.",
            "Pictured is {letter}.{letter}.{letter}. {name} with a {thing}.",
        ],
    },
    "acronyms": {
        "tuned": [
            "A U.S. flag flies {place}.",
            "The truck belongs to the U.S. Army.",
            "The photo was taken in Washington, D.C. in {year}.",
            "The clock says 5 p.m. on a {quality} day.",
            "It opens at 9 a.m. and closes at 6 p.m. daily.",
            "Flags wave all over the U.S.¶The crowd cheers.",
            "The shop opens at 9 a.m.¶It closes at 6 p.m.¶A {thing} {verb} {place}.",
            "Fruit, e.g. apples, i.e. round ones, fills a {thing}.",
        ],
        "held_out": [
            "A U.K. passport lies {place}.",
            "The label says Made in the U.S.A. in small letters.",
            "A map of the U.S.S.R. hangs {place}.",
            "The train leaves at 7:15 a.m. from {city}.",
            "The party starts at 8 p.m.¶Everyone is welcome.",
            "She holds a B.A. degree and an M.B.A. diploma.",
            "He has lived in the U.K.¶Now he rides a {thing}.",
            "A match of red vs. blue takes place at 3 p.m. sharp.",
        ],
    },
    "units": {
        "tuned": [
            "Bake for {small} min. until golden.",
            "The board is {small} in. wide and {small} ft. long.",
            "Add 2 tbsp. sugar and 1 tsp. salt.",
            "Temp. below zero is shown on the {thing}.",
            "Set the oven to a temp. of 350 degrees.",
            "The pack weighs {small} oz. or {amount} lb. in all.",
            "Cook the rice for {small} min.¶Serve it {quality}.",
            "The {thing} is approx. {small} in. tall.",
            "The {thing} measures {small} in.¶It is {quality}.",
            "Size approx. | {price} | free shipping.",
        ],
        "held_out": [
            "Let it rest for {small} hrs. before serving.",
            "The rope is {small} yd. long and {amount} cm. thick.",
            "Pour in 1 qt. milk and 3 pt. cream.",
            "The flat has 900 sq. ft. of space.",
            "The tank holds {small} gal. at most.",
            "The max. load is {small} kg. per shelf.",
            "Use 1 pkg. yeast with {small} doz. eggs.",
            "The ride takes {small} sec. from start to end.",
            "The net wt. is {amount} oz. per can.",
            "Chill it for {small} hrs.¶Cut it into {small} slices.",
            "A jar of dia. {amount} cm. {verb} {place}.",
            "The price incl. tax is {price} per piece.",
        ],
    },
    "prices": {
        "tuned": [
            "The price is {price}.",
            "Tickets cost $5. and up.",
            "It costs {price} today.",
            "The tag says {price}!¶The {thing} is new.",
            "Shirts are {price}.¶Shoes are {price}.",
            "A {thing} for {price} | a {thing} for {price}.",
        ],
        "held_out": [
            "Rooms start at $80. per night.",
            "The menu lists soup at {price} and tea at {price}.",
            "From $20. to $30. each.",
            "Only {price}!¶Buy one {thing} today.",
            "The bill is {price}.¶Payment is due at once.",
            "Was {price} | now {price} | while supplies last.",
        ],
    },
    "numbers": {
        "tuned": [
            "See No. 5 and Fig. 3 for the {thing}.",
            "The engine makes {amount} litres, as in v2.0 of the plan.",
            "Chapter 2.1 shows a {thing}.",
            "The race was held in {year}.¶A {thing} {verb} {place}.",
            "Born in ca. {year}, he holds a {thing}.",
            "Est. {year}, the shop {verb} {place}.",
            "He is 3.¶She is {small}.",
        ],
        "held_out": [
            "The plate says Vol. 2, pp. 14-20.",
            "A stamp of {year} (cat. no. 12) lies {place}.",
            "The score is {amount} to {amount}.",
            "He moved here c. {year} with a {thing}.",
            "Route 66.¶A {thing} {verb} {place}.",
            "The house is No. {small}.¶Its door is {quality}.",
            "The map shows Mt. Fuji at approx. 3,776.2 m above the sea.",
        ],
    },
    "companies": {
        "tuned": [
            "A truck of {name} Bros. Inc. {verb} {place}.",
            "The logo of {name} & Co. is {quality}.",
            "The office of {name} Ltd. {verb} at 12 Main St. in {city}.",
            "The building belongs to {name} Corp.¶It looks {quality}.",
            "Apples, pears, etc. fill a {thing}.",
            "There are cups, plates, etc.¶A {thing} {verb} {place}.",
        ],
        "held_out": [
            "A van of the Fire Dept. in {city} {verb} {place}.",
            "The {name} Mfg. Co. made this {thing}.",
            "The house on 5th Ave. near Sunset Blvd. looks {quality}.",
            "The {name} Assn. of {city} meets {place}.",
            "The label names {name} Inc.¶The {thing} is {quality}.",
            "Pens, rulers, etc. lie {place}.",
            "They live at 8 Elm Rd. with a {thing}.",
        ],
    },
    "web": {
        "tuned": [
            "Visit {site} for more.",
            "The page {site}.¶It shows a {thing}.".replace("The page", "The page is"),
            "Write to info@example.com today.",
            "The file {file} shows a {thing}.",
            "Save it as {file}.¶A {thing} {verb} {place}.",
        ],
        "held_out": [
            "The banner reads {site} in {quality} letters.",
            "Photo by {first} at {site}.¶All rights reserved.",
            "Mail a.b.smith@mail.example.org or call +1.555.0100 now.",
            "Open {file} or {file} first.",
            "Find it on {site}!¶The {thing} is {quality}.",
        ],
    },
    "quotes": {
        "tuned": [
            'The sign reads "{shout}!" in {quality} letters.',
            '"{shout}!" says the {thing}.',
            "“Is it a {thing}?” they ask.",
            'A banner says "{shout}."¶A {thing} {verb} {place}.',
            "The label reads “Est. {year}.”¶It is {quality}.",
            'He says, "It is {quality}."¶She nods.',
            '"Where is the {thing}?"¶"It is {place}."',
            "(A {thing} {verb} {place}.)¶It is {quality}.",
            "A {thing} (really {quality}!) {verb} {place}.",
        ],
        "held_out": [
            "The words ‘{shout}!’ are written {place}.",
            "«{shout}!» is painted on the {thing}.",
            'The caption "Who is it?" is printed below.',
            "“{shout}!” cries {first}.¶“{shout}!” answers {first}.",
            'The poster reads "No. 1 in {city}."¶People walk {place}.',
            'The button says "OK."¶The screen is {quality}.',
            "'Do you see the {thing}?'¶'No.'",
            "[A {thing} {verb} {place}.]¶The end.",
            "The {thing} (is it {quality}?) {verb} {place}.",
        ],
    },
    "lists": {
        "tuned": [
            "1. A {thing} {verb} {place}.¶2. It is {quality}.",
            "Steps: 1. chop, 2. fry, 3. serve hot.",
            "The list says 1. Chop, 2. Fry, 3. Serve.",
            "Ingredients:↵- {small} eggs↵- 1 tsp. salt",
            "1. Chop the onions.↵2. Fry the {thing}.",
            "a) a {thing}, b) a {thing}.",
        ],
        "held_out": [
            "1. Open the box.¶2. Take out the {thing}.¶3. Enjoy!",
            "How to: 1. cut, 2. fold and 3. glue.",
            "Choose 1. Red, 2. Green or 3. Blue.",
            "* a {thing}↵* a {thing}↵* {amount} oz. butter",
            "1) Wash the {thing}.↵2) Dry it.",
            "The menu:↵1. Soup↵2. Salad",
        ],
    },
    "ellipses": {
        "tuned": [
            "Wait... what is it?",
            "A {thing}... or so it seems.",
            "He waits…¶Then he sees a {thing}.",
            "The text fades out...¶A {thing} {verb} {place}.",
            "He thinks . . . and thinks.",
        ],
        "held_out": [
            "And so… the {thing} {verb} {place}.",
            "Well... maybe not.",
            "To be continued...¶The {thing} is {quality}.",
            "It goes on and on…¶Nobody moves.",
            "Loading...please wait.",
        ],
    },
    "marks": {
        "tuned": [
            "Really?!¶Yes!!!",
            "A {thing} {verb} {place}. 🐶¶It is {quality}.",
            "**A {quality} {thing}.**¶It {verb} {place}.",
            "Mail from Yahoo! Mail {verb} {place}.",
            "It is {quality} !¶A {thing} {verb} {place} .",
        ],
        "held_out": [
            "What?!!¶A {thing}!",
            "So {quality}! 😍✨¶The {thing} {verb} {place}.",
            "_A {thing}._¶*It is {quality}.*",
            "A scene from Jeopardy! with {first} {name}.",
            "Good morning !¶The {thing} {verb} {place} ?",
        ],
    },
    "lines": {
        "tuned": [
            "A {thing} {place}↵The light is {quality}.",
            "Title: The {thing}↵Artist: {first} {letter}. {name}↵Year: {year}",
        ],
        "held_out": [
            "{city}, {year}↵A {thing} {verb} {place}.",
            "Name: {first} {name}↵Price: {price}↵In stock.",
        ],
    },
    "cjk": {
        "tuned": [
            "一只小狗在草地上奔跑。‖天空很蓝！‖你看到了吗？",
            "桌子上有一个{small}升的花瓶。‖光线很柔和。",
            "犬が公園で走っている。‖空は青い。",
            "「おいしい！」と彼女は言う。‖猫が見ている。",
            "画面左侧是一辆价格为3.5万元的汽车。‖右侧有一棵树。",
        ],
        "held_out": [
            "这张照片展示了一座古老的桥。‖桥下有水。‖真美！",
            "图中有{small}个人？‖是的。",
            "店の前に自転車がある。‖値段は1.5万円です！",
            "「どこへ行くの？」と父が聞く。‖子供は笑う。",
            "강아지가 공원에서 뛰고 있다.¶하늘이 파랗다!",
        ],
    },
    "other_scripts": {
        "tuned": [
            "يظهر كلب في الحديقة.¶هل السماء زرقاء؟¶نعم، هي زرقاء.",
            "הכלב רץ בפארק.¶השמיים כחולים!",
            "एक कुत्ता पार्क में दौड़ रहा है।¶आसमान नीला है।",
            "Собака бежит по парку.¶Это г. Москва в {year} году.",
            "Un chien court dans le parc.¶M. Dupont le regarde.",
        ],
        "held_out": [
            "تجلس قطة على الكرسي.¶الضوء ساطع!¶أين الطفل؟",
            "د. أحمد يقف أمام البيت.¶الباب أزرق.",
            "החתול יושב על הכיסא.¶מה השעה?",
            "एक बिल्ली कुर्सी पर बैठी है।¶क्या यह सफेद है?",
            "Der Hund läuft z.B. im Park.¶Er ist ca. {small} Jahre alt.",
            "¿Es un perro?¶¡Sí!¶El Sr. {name} lo mira.",
        ],
    },
}
LOWER_CASE: dict[Part, list[str]] = {
    "tuned": [
        "a {thing} {verb} {place}.",
        "it looks {quality}!",
        "is it a {thing}?¶no.",
        "approx. {small} in. tall, with a {thing}.",
        "tickets from $5. and up.",
        "a jar with 2 tbsp. sugar.",
    ],
    "held_out": [
        "two {quality} cats near a {thing}.",
        "what a {quality} {thing}!",
        "so who is it?¶nobody.",
        "about {small} ft. wide and {small} oz. heavy.",
        "a photo by mr. {name} and dr. {name}.",
        "made by hand in {year}.",
    ],
}
"""Whole captions without capitals, as some captioners and much alt text have them."""
PLAIN_SHARE, LOWER_SHARE = 0.4, 0.06
"""Of passages that are plain prose, and of captions without capitals."""


@dataclass(frozen=True)
class Known:
    """One caption, its sentences, and the kinds of the passages that it was put together from."""

    text: str
    sentences: list[str]
    kinds: tuple[str, ...]


def captions(count: int, part: Part, seed: int = 0) -> list[Known]:
    """`count` captions of 1 to 6 passages; the same for the same arguments."""
    rng = random.Random(f"{part}/{seed}")
    return [_caption(rng, part) for _ in range(count)]


def _caption(rng: random.Random, part: Part) -> Known:
    if rng.random() < LOWER_SHARE:
        kinds = ["lower case"] * rng.randint(2, 4)
        passages = [rng.choice(LOWER_CASE[part]) for _ in kinds]
    else:
        hard = [kind for kind in TEMPLATES if kind != "plain"]
        kinds = ["plain" if rng.random() < PLAIN_SHARE else rng.choice(hard) for _ in range(rng.randint(1, 6))]
        passages = [rng.choice(TEMPLATES[kind][part]) for kind in kinds]
    marked = ""
    for kind, passage in zip(kinds, passages, strict=True):
        # A passage that may end without a stop is followed by a line end, as it would be in print.
        marked += (
            "" if not marked else "↵" if kind in ("lists", "lines") or marked[-1] not in _CLOSED else "¶"
        ) + passage
    if kinds != ["lower case"] * len(kinds) and rng.random() < 0.1:
        marked = marked.rstrip(".")
    marked = re.sub(r"\{(\w+)\}", lambda m: rng.choice(POOLS[m[1]].split("|")), marked)
    spaces = re.sub("[¶↵‖]", lambda m: "\x00" + _gap(m[0], rng), marked)
    return Known(spaces.replace("\x00", ""), [s.strip() for s in spaces.split("\x00")], tuple(kinds))


_CLOSED = ".!?…。！？।؟”\"'’»)]*_"


def _gap(mark: str, rng: random.Random) -> str:
    if mark == "‖":
        return ""
    if mark == "↵":
        return "\n"
    return rng.choices((" ", "  ", "\n", "\n\n"), (88, 4, 6, 2))[0]


def boundaries(text: str, sentences: list[str]) -> set[int]:
    """Where a sentence other than the first begins in `text`, counted in characters that are not white space: how a
    splitter treats white space, and what it drops at a sentence's end, does not matter."""
    squeezed = "".join(text.split())
    found, position = set(), 0
    for sentence in sentences:
        piece = "".join(sentence.split())
        position = squeezed.index(piece, position)
        found.add(position)
        position += len(piece)
    return found - {0}


def score(split: Callable[[str], list[str]], known: Sequence[Known]) -> tuple[float, float]:
    """Precision and recall in % of the boundaries that `split` finds, over all captions together."""
    right = found = there = 0
    for caption in known:
        ours, theirs = boundaries(caption.text, split(caption.text)), boundaries(caption.text, caption.sentences)
        right, found, there = right + len(ours & theirs), found + len(ours), there + len(theirs)
    return 100 * right / found, 100 * right / there
