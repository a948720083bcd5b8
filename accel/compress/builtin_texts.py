"""The built-in calibration texts, written for this project; evaluation texts share nothing with them.

Short and varied on purpose: stories, letters, instructions, news, questions and answers, talk, lists, tables, code of
several languages, and a little of other human languages.
"""

from __future__ import annotations

_PROSE = """
Every morning before the bakery opened, Tomas swept the step and counted the sparrows on the wire. If there were more
than ten, he put an extra tray of rolls into the oven. His wife thought it was nonsense, but over the years she had
noticed that on sparrow days the rolls were gone by nine. "They know about the weather," he said, "and the weather
knows about people."

A glacier is a river that has forgotten how to hurry. Snow falls on the upper slopes, is buried by more snow, and
slowly turns to ice under its own weight. The ice creeps downhill a few centimetres a day, scraping the rock beneath
it and carrying boulders the size of houses. Where it melts, it leaves them standing in meadows, far from any
mountain.

Dear Ms. Okafor, thank you for your letter of 14 May. We are sorry that the second lamp arrived with a cracked shade.
A replacement left our warehouse this morning and should reach you by Thursday; you need not return the damaged one.
If there is anything else we can do, please write to me directly. With kind regards, Henrik Lund, customer service.

The company reported a net profit of 41.7 million dollars for the third quarter, up from 36.2 million a year earlier.
Revenue rose by 8 percent to 512 million, mostly because of strong demand in Asia. Shares fell 2.3 percent in early
trading nevertheless, after the chief financial officer warned that higher energy prices would weigh on margins next
year.

How do I get candle wax out of a tablecloth? First let the wax harden, or put the cloth into the freezer for an hour,
and scrape off what you can with a blunt knife. Then lay paper towels above and below the stain and press with a warm
iron, changing the paper until it comes away clean. Wash as usual. Coloured wax may need a little alcohol.

The detective closed the file. "Nobody leaves a house at four in the morning to buy stamps," she said. Her assistant
shrugged. "Unless they wanted to be seen." Outside, the tram rattled past, empty and lit. She looked at the photograph
again: the gloves, the open umbrella, the clock that showed ten minutes to six. "Seen," she repeated, "by whom?"

Photosynthesis turns light into chemical energy. In the leaves of a plant, chlorophyll absorbs mostly red and blue
light; the green is reflected, which is why leaves look green to us. With that energy the plant splits water, releases
oxygen, and binds carbon dioxide from the air into sugar. Nearly all the food on Earth, and nearly all its oxygen,
begins this way.

In 1904 the town had one telephone, and it hung in the pharmacy. Whoever wanted to make a call stood between the
scales and the jars of liquorice while half the street listened. When a second line was laid in 1911, to the house of
the doctor, the pharmacist complained to the mayor that his customers had stopped coming in for cough syrup.

Patient is a 54-year-old man who came in with chest pain that began two hours ago while he was climbing stairs. The
pain is dull, radiates to the left arm and is accompanied by sweating. Blood pressure 148/92, pulse 96 and regular.
History of high cholesterol, no known allergies. An ECG and blood tests were ordered, and 300 mg of aspirin were
given.

My flight was supposed to land at noon, but we circled for forty minutes because of fog and then went to another
airport altogether. The airline put us on a bus. I sat beside a man who was carrying a cello, which had its own seat,
and he told me that it had once been to Reykjavik without him. I arrived at six, hungry, and strangely happy.

The tenant shall pay the rent in advance, on or before the third working day of each month. If payment is late by more
than ten days, the landlord may charge interest at the legal rate. The tenant may not sublet the premises, in whole or
in part, without the written consent of the landlord, which shall not be withheld without good reason.

Start with the corner pieces, everyone says, and then do the edges. My sister never did. She would pick one face from
the picture, a dog or an old woman in a window, and search the whole box for it, and build outward from there. Her
puzzles looked like islands. In the end they always met, and the frame was the last thing to close.

Two trains leave stations that are 300 kilometres apart at the same time and travel toward each other. One moves at 70
km/h, the other at 80 km/h. Together they close 150 kilometres every hour, so they meet after 300 / 150 = 2 hours. By
then the slower one has covered 140 kilometres and the faster one 160, which adds up to 300 as it should.

Water the seedlings from below, so that the leaves stay dry. As soon as the second pair of leaves appears, move each
plant into its own pot, holding it by a leaf and never by the stem. Keep the pots cool and bright for two weeks. After
the last frost, harden them off outdoors for a few hours a day before you plant them in the bed.

The referee looked at his watch, then at the linesman, then at the sky, as if the answer might be written there. Forty
thousand people held their breath. When he finally pointed to the spot, half the stadium rose with a roar and the
other half fell silent. The goalkeeper wiped his gloves on the grass, took two steps forward, and began to smile.

User: Can you explain what a hash table is, in simple words? Assistant: Imagine a wall of numbered mailboxes. To store
something under a name, you compute a number from the name and put the thing into the box with that number. To find it
again, you compute the same number and look only into that box. If two names lead to the same box, both things lie in
it, and you compare the names.

The Romans built roads in layers: large stones at the bottom, then rubble, then gravel bound with lime, and slabs on
top, slightly arched so that the rain ran off. Milestones told the traveller how far it was to the next town. Some of
these roads carried carts for a thousand years, and parts of them still lie under the asphalt of modern highways.

I would not recommend this hotel to anyone who sleeps lightly. The room was clean and the staff were friendly, but the
walls are thin and the bar downstairs closes at two. Breakfast is good, with fresh fruit and decent coffee. If you can
get one of the rooms at the back, on the fourth floor or above, it is worth the price. Otherwise bring earplugs.

What is the difference between weather and climate? Weather is what happens outside today: rain, wind, a sudden warm
afternoon. Climate is the pattern of many years taken together. One cold winter says little about the climate, just as
one bad game says little about a team. But when the averages move, season after season, the pattern itself has
changed.

Once there was a miller who owned three things: a mill that did not turn, a donkey that did not walk, and a daughter
who did not lie. The king heard of the daughter and sent for her. "Is it true," he asked, "that you have never told a
lie?" "No," she said. "Last week I told the donkey that it was clever." The king laughed so loudly that the guards
came in.

Sleep has several stages that repeat about every ninety minutes. In deep sleep the heart slows down and the body
repairs tissue; in the stage of rapid eye movements the brain is almost as busy as by day, and most dreams happen
then. People who are kept from dreaming become irritable, and make up for it as soon as they are allowed to sleep
again.

The minister rejected the proposal on Wednesday, calling it "well meant but impossible to finance". Opposition leaders
accused the government of breaking a promise that it had made before the election. A compromise, under which the
school buildings would be repaired over six years instead of three, is expected to be debated in committee next month.

She learned to sail in a boat that was older than her father. It leaked where the mast met the deck, and its one sail
had been mended so often that it looked like a map of some crowded country. "If you can sail this," the harbour master
said, "you can sail anything." Years later, in a storm off Cape Horn, she found out that he had been almost right.

An electric motor and a generator are the same machine, used in opposite directions. Send a current through a coil
that sits in a magnetic field, and the coil turns. Turn the coil by hand, and a current flows. When an electric car
brakes, its motor becomes a generator for a moment, and some of the energy of motion goes back into the battery.

Ladies and gentlemen, thank you for coming tonight. When we started this library, we had four hundred books and a room
with a leaking roof. Today we have thirty thousand books, and the roof only leaks in one place. (Laughter.) I would
like to thank the volunteers, whose names are on the wall behind me, and above all the children, who never once used
an inside voice.

The probability of throwing at least one six with four dice is easier to find from the other side. No six on one die
has probability 5/6, so no six on four dice has (5/6)^4 = 625/1296, about 0.482. At least one six therefore has
probability 1 - 0.482 = 0.518. A gambler who bets on it at even odds wins a little more often than he loses.

Heat the oil in a large pan and cook the onions over low heat until they are soft, about eight minutes. Add the
garlic, cumin and chilli and stir for one minute more. Pour in the tomatoes and the drained beans, season with salt,
and let it simmer without a lid for half an hour. Serve with rice, chopped coriander and a spoonful of yoghurt.

Octopuses have three hearts and blue blood. Two hearts pump blood through the gills, the third sends it through the
body; it stops beating while the animal swims, which may be why octopuses prefer to crawl. Their blood is blue because
it carries oxygen with copper instead of iron. Most of their nerve cells lie not in the head but in the arms.

Re: Friday. Hi Anna, sorry for the late answer, the week was chaos. Friday works for me, but could we start at 10:30
instead of 10? I have to bring the car to the garage first. I attached the new slides; numbers 7 to 9 still need
figures from Raj. Should I book the small room, or do we expect more than six people? Best, Miriam

To reset the router, press the small button on the back with a paper clip and hold it for ten seconds, until all
lights go out. Wait two minutes. Connect a computer by cable, open a browser and enter 192.168.0.1 in the address bar.
Log in with the password printed on the label, choose a new one, and write it down before you press Save.

The painting shows a kitchen in the late afternoon. On the table lie half a loaf, a knife, two onions and a letter
that someone has folded again along the old creases. There are no people. Yet the chair is pushed back, the door
stands open by a hand's width, and the light on the tiles is that of a minute in which something has just been
decided.

Inflation means that money buys less than it did before. A little of it is thought to be harmless, perhaps useful,
since it encourages people to spend and invest rather than to hoard. When prices rise quickly, however, wages and
savings cannot keep up, and those suffer most who hold cash or live on fixed incomes. Central banks then raise
interest rates.

It was the kind of rain that does not fall but stands in the air and waits for you. By the time he had reached the
station his coat was heavy and his notes had run together into one blue sentence. He read them anyway. Where it had
said "do not forget" it now said "do not forge", and he took that for good advice.

The theorem says that in a right triangle the square over the longest side is as large as the squares over the other
two together: a^2 + b^2 = c^2. One proof needs no algebra. Arrange four copies of the triangle inside a square of side
a + b, once so that they leave a tilted square of side c, once so that they leave two squares of sides a and b. What
is left over must be equal.
"""

_OTHER = [
    """Packing list for a week in the mountains:
- two pairs of trousers, one of them waterproof
- wool socks (at least four pairs)
- a warm hat, gloves, a scarf
- first-aid kit: plasters, bandage, painkillers, tweezers
- map 1:25000, compass, whistle
- 1.5 litres of water per person and day
- chocolate, nuts, dried apricots""",
    """def merge_counts(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    \"\"\"Add the counts of two dictionaries.

    Args:
        left: Counts by word.
        right: Counts by word; words may be in both.

    Returns:
        A new dictionary with the sum for every word.
    \"\"\"
    result = dict(left)
    for word, count in right.items():
        result[word] = result.get(word, 0) + count
    return result""",
    """Minutes of the garden club, 3 February
1. The minutes of January were approved.
2. Treasurer: balance 1,284.50, of which 300.00 are set aside for the new fence.
3. The seed exchange takes place on 8 March, 14:00, in the parish hall. Cakes: Ines, Walter, Mrs. Petrov.
4. Any other business: slugs. A long discussion without result.
Next meeting: Tuesday, 4 March, 19:30.""",
    """class Stack:
    \"\"\"A last-in, first-out container.\"\"\"

    def __init__(self):
        self._items = []

    def push(self, item):
        \"\"\"Put an item on top of the stack.\"\"\"
        self._items.append(item)

    def pop(self):
        \"\"\"Remove and return the top item.

        Raises IndexError if the stack is empty.
        \"\"\"
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()""",
    """| Planet  | Diameter (km) | Moons | Day length |
|---------|---------------|-------|------------|
| Mercury | 4,879         | 0     | 176 days   |
| Venus   | 12,104        | 0     | 117 days   |
| Earth   | 12,742        | 1     | 24 hours   |
| Mars    | 6,779         | 2     | 24.7 hours |
| Jupiter | 139,820       | 95    | 9.9 hours  |""",
    """#include <stdio.h>

/* Prints the greatest common divisor of two numbers. */
static unsigned gcd(unsigned a, unsigned b) {
    while (b != 0) {
        unsigned rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

int main(void) {
    printf("%u\\n", gcd(84, 36));
    return 0;
}""",
    """Q: Which of these is not a mammal: whale, bat, penguin, otter?
A: The penguin. It is a bird: it has feathers and lays eggs.
Q: How many edges does a cube have?
A: Twelve.
Q: Who wrote the play in which a prince talks to a skull?
A: William Shakespeare; the play is Hamlet.
Q: What is the boiling point of water at sea level?
A: 100 degrees Celsius, or 212 degrees Fahrenheit.""",
    """read_config(path, *, strict=False)
    Read a configuration file and return its sections as nested dictionaries.

    The file is opened in text mode with UTF-8 encoding. Lines that start with '#' are ignored. If strict is true, an
    unknown key raises ConfigError; otherwise a warning is issued and the key is kept. Returns None if the file is
    empty. See also write_config() and the section "File format" below.""",
    """SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS revenue
FROM customers AS c
LEFT JOIN orders AS o ON o.customer_id = c.id
WHERE c.created_at >= '2023-01-01'
GROUP BY c.name
HAVING SUM(o.total) > 1000
ORDER BY revenue DESC
LIMIT 20;""",
    """{
  "name": "weather-station",
  "version": "2.4.1",
  "sensors": [
    {"id": 17, "kind": "temperature", "unit": "celsius", "interval": 60},
    {"id": 18, "kind": "humidity", "unit": "percent", "interval": 300}
  ],
  "location": {"lat": 47.3769, "lon": 8.5417},
  "active": true
}""",
    """Kurz nach Mitternacht begann es zu schneien. Am Morgen lag der Marktplatz still und weiß da, nur eine Katze hatte
ihre Spur quer darüber gezogen, vom Brunnen bis zur Tür der Bäckerei. Die Kinder blieben stehen und überlegten, ob man
darauf treten dürfe.""",
    """Le train de nuit s'arrêtait dans chaque village. À trois heures, une femme monta avec un panier de cerises,
en offrit à tout le compartiment et descendit à la gare suivante sans avoir dit son nom. Il resta les
noyaux, et l'odeur de l'été.""",
    """La plaza estaba vacía, salvo por un anciano que daba de comer a las palomas. Cada día, a la misma hora, traía pan
duro en una bolsa de papel y hablaba con ellas como si fueran viejos amigos que hubieran llegado tarde.""",
    """function debounce(callback, delay) {
  let timer = null;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => callback(...args), delay);
  };
}

// Save the draft at most once every half second.
input.addEventListener("input", debounce(saveDraft, 500));""",
    """usage: backup [-h] [--target DIR] [--keep N] [--dry-run] source

Copy a folder to a dated archive.

positional arguments:
  source        folder to copy

options:
  -h, --help    show this help message and exit
  --target DIR  where archives are kept (default: ~/backups)
  --keep N      delete all but the newest N archives
  --dry-run     say what would be done, and do nothing""",
    """Traceback (most recent call last):
  File "report.py", line 48, in <module>
    main()
  File "report.py", line 41, in main
    total = sum(row.price for row in rows)
TypeError: unsupported operand type(s) for +: 'int' and 'NoneType'

The price of one row is missing. Filter such rows out first, or give the column a default of 0.""",
    """$ git status
On branch main
Changes not staged for commit:
        modified:   src/parser.py
        modified:   tests/test_parser.py
$ git add -A && git commit -m "Parse numbers with exponents"
[main 4f2c9d1] Parse numbers with exponents
 2 files changed, 31 insertions(+), 4 deletions(-)""",
    """The following exceptions are raised by this module:

exception QueueFull
    Raised by put() if the queue already holds maxsize items and block is false.

exception QueueEmpty
    Raised by get() if there is nothing to return within the given timeout. The timeout is a float in seconds; None
    means that the call waits until an item arrives. Subclass of LookupError.""",
    """Chapter 3. In which it rains

The house had eleven clocks, and no two of them agreed. Grandfather wound them on Sundays, one after the other, from the
cellar to the attic, and it took him until lunch. He said that time was like soup: if everybody had the same there would
be nothing to talk about. I liked the one on the landing best. It ran backwards.""",
    """Solve 3x + 7 = 22. Subtract 7 from both sides: 3x = 15. Divide by 3: x = 5. Check: 3 * 5 + 7 = 15 + 7 = 22.
Solve x^2 - 5x + 6 = 0. Two numbers with sum 5 and product 6 are 2 and 3, so (x - 2)(x - 3) = 0 and x = 2 or x = 3.
Find the area of a circle with radius 4 cm: A = pi * r^2 = 16 pi, about 50.3 square centimetres.""",
    """<article class="card">
  <h2>Opening hours</h2>
  <p>Monday to Friday: <time>9:00</time> - <time>17:30</time></p>
  <p>Saturday: by appointment only. <a href="/contact">Write to us</a>.</p>
</article>""",
    """Customer: I ordered the blue one and got the green one.
Agent: I'm sorry about that! Could you give me the order number?
Customer: 88213-A.
Agent: Thank you. I can see the mistake. Would you like to keep the green one at half price, or send it back for free?
Customer: Hmm. Actually, green is growing on me. I'll keep it.
Agent: Wonderful. You will get 24.95 back within three days. Is there anything else?""",
    """Vocabulary: brave - not afraid of danger. The brave firefighter went back into the house. Opposite: cowardly.
fragile - easily broken. These glasses are fragile, so wrap them in paper. Opposite: sturdy.
to postpone - to do something later than planned. They postponed the match because of the snow. Opposite: to bring
forward.""",
    """NAME
    sortlines - sort the lines of a text file

DESCRIPTION
    Writes the sorted lines of all given files to standard output. With no file, or when the file is -, standard input
    is read. Sorting is stable: lines that compare equal keep the order in which they were read.

    -n  compare by numerical value
    -r  reverse the result
    -u  print only the first of equal lines""",
    """News in brief. Storm: about 12,000 homes in the north were without power on Sunday night. Culture: the city
museum extends its show of Japanese woodcuts until 30 June. Science: astronomers have found a planet that
circles its star in only nineteen hours. Sport: Larsen won the 400 metres in 51.08 seconds. Weather: sunny
spells, showers later, 17 C.""",
    """import random
import unittest


class TestShuffle(unittest.TestCase):
    def setUp(self):
        self.cards = list(range(52))

    def test_keeps_all_cards(self):
        random.shuffle(self.cards)
        self.assertEqual(sorted(self.cards), list(range(52)))

    def test_rejects_tuples(self):
        with self.assertRaises(TypeError):
            random.shuffle((1, 2, 3))


if __name__ == "__main__":
    unittest.main()""",
    """Dear diary, today I wanted to begin a new life, but the alarm clock was against it. Instead of running I had
toast. At work the printer ate the contract, twice. Then, in the evening, something good: the neighbour's
boy has learned to ride his bicycle without holding on, and he rang everyone's bell to show it, and everyone
came out.""",
    """Abstract. We study how the choice of route in a road network changes when drivers are told current travel
times. In a field trial with 214 drivers over eight weeks, information reduced the mean travel time by 6.1
percent (p < 0.01), but raised its variance. A simple model, in which drivers react with a delay, explains
both effects. Implications for the design of navigation services are discussed.""",
    """Name: Lentil soup
Serves: 4
Time: 40 minutes
Ingredients: 250 g red lentils, 1 onion, 2 carrots, 1 tbsp tomato paste, 1 l vegetable stock, lemon, salt, pepper
Steps: 1. Chop the onion and the carrots and fry them gently. 2. Add lentils, tomato paste and stock. 3. Simmer for 25
minutes. 4. Blend, season, and add lemon juice to taste.""",
    """"Do you take sugar?" "No. Well, yes, but I'm trying not to." "Then I'll ask again in a minute." They listened to
the kettle. "You never said why you came." "I was passing." "Nobody passes here, Lena. The road ends at my gate." She
laughed, and then she did not laugh. "All right," she said. "Two sugars.\"""",
]

TEXTS: tuple[str, ...] = tuple(part.strip() for part in _PROSE.strip().split("\n\n")) + tuple(_OTHER)

__all__ = ["TEXTS"]
