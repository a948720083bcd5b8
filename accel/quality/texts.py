"""The built-in evaluation texts, written for this project; calibration texts share nothing with them."""

from __future__ import annotations

_PASSAGES = """
The ferry leaves the old harbour at ten past seven, and on windy mornings it is late before it has even started. The
crew knows most of the passengers by name. A retired teacher brings coffee for the deckhand, who in return keeps the
bench behind the wheelhouse free for her, where the spray does not reach and the sun comes first.

To sharpen a kitchen knife on a stone, soak the stone for ten minutes and lay it on a damp cloth. Hold the blade at
about fifteen degrees and draw it over the stone from heel to tip, with light pressure and a steady hand. Repeat until
a thin burr can be felt along the other side, then turn the knife over and do the same again.

A binary search looks at the middle element of a sorted list. If the value that is wanted is smaller, it goes on in
the left half, otherwise in the right one. Each comparison halves what is left, so a million entries take twenty steps.
The idea is simple, yet the details are easy to get wrong: an index that overflows, a loop that never ends.

My grandmother kept bees at the edge of the orchard. She never wore gloves, and she spoke to the hives while she worked,
in a low voice, about the weather and about us. When she died, my uncle went out and told them, because somebody had
to. He said that they were quiet for a moment, and then went back to the clover.

The council met on Tuesday to discuss the new bus line. Three members asked for a stop at the hospital, two wanted a
shorter route through the industrial park, and the mayor reminded everyone that the budget had been settled in March. A
decision was put off until the traffic study is finished, which should take about six weeks.

Granite forms deep underground when molten rock cools so slowly that its crystals have time to grow. Quartz, feldspar
and mica can be told apart with the naked eye. Lava that reaches the surface cools within days or hours instead, and
the basalt that it leaves has grains too small to see without a microscope.

"You said that you had locked it." "I said that I thought I had locked it." They stood in front of the open shed and
looked at the place where the bicycles had been. "So what do we tell the children?" He picked up the broken padlock,
turned it over twice, and put it into his pocket. "The truth, I suppose. And that we walk to school tomorrow."

Interest that is paid on interest grows faster than most people expect. A sum that earns five percent a year has doubled
after a little more than fourteen years, and after fifty years it is more than eleven times as large. The same
arithmetic works against those who owe: a debt that is left alone does not stay what it was.

The violin's sound post is a small stick of spruce that stands between the top and the back, held by nothing but
pressure. Makers call it the soul of the instrument. Moved by half a millimetre, it changes the balance between the
strings; moved by two, it can make a good violin sound like a cheap one.

Sourdough needs patience more than skill. Flour and water, left alone in a warm corner, begin to bubble after a few
days, because wild yeasts and bacteria were there all along. Feed the mixture daily, keep what you need and bake with
the rest. Bread made this way rises slowly, tastes a little sour, and stays fresh for most of a week.

In the northern town the sun does not rise for seven weeks. Street lamps burn at noon, schools open their gyms to
everyone, and the library lends out lamps that imitate daylight. Visitors ask how people bear it. The answer is usually
a shrug and an invitation: to a sauna, to a choir, to a kitchen in which something has been cooking since morning.

The function takes a list of intervals and returns them merged. It first sorts them by their start, then walks through
them once. An interval that begins before the last one ends is joined to it; any other starts a new group. Sorting takes
most of the time. The walk itself touches every interval exactly once and needs no further memory.

Before the bridge was built, the valley had two dialects. Families on either side of the river married among
themselves, sold their cheese at different markets, and told jokes about one another that nobody outside understood.
Two generations later the words have mixed, the jokes have survived, and no one remembers who started them.

A vaccine shows the immune system a harmless part of a germ, so that it learns to recognise the whole. Some of the cells
that answer stay for years, in the marrow and the lymph nodes. If the real germ appears, they multiply within days
rather than weeks, and often the illness is over before it has been noticed.

He had been given the smallest office on the fourth floor, with a window onto the shaft in which the pigeons nested. At
first he complained. By spring he had named the pigeons, kept a notebook on their habits, and refused a larger room on
the sunny side with an excuse so vague that his colleagues began to wonder about his work.

The rules are short. Each player draws seven tiles and may exchange up to three of them once. Whoever holds the double
six begins; if nobody does, the oldest player starts. Tiles are laid end to end with equal numbers touching. A player
who cannot move draws one tile and passes. The round ends when somebody lays down the last tile.

Paper was once made from rags. Collectors went from house to house for worn linen, which mills then soaked, beat to pulp
and spread on wire screens. When demand outgrew the supply of old shirts, inventors tried straw, nettles and moss, until
in the nineteenth century they learned to make it from wood, cheaply and in quantity, though it yellowed.

The error appeared only on the last day of the month, and only on machines whose clock was set to local time. It took a
week to find. A report was created shortly before midnight, stored shortly after, and filed under a month that, as far
as the database was concerned, had not begun. The fix was one line; the explanation took two pages.

Octopuses taste with their arms. Each sucker carries thousands of cells that sense chemicals on whatever it touches, so
that an arm which reaches into a crevice can tell a crab from a stone without any help from the eyes. Two thirds of
the animal's nerve cells lie in the arms, which seem to decide a good deal on their own.

Take the second street on the left after the chapel and follow it down to the water. You will see a yellow house with a
boat in the garden; that is not ours. Go on past the woodpile, through the gate that does not close properly, and knock
at the blue door. If the dog barks, say his name, which is Admiral, and he will let you in.

Glass is neither quite a liquid nor an ordinary solid. Its atoms are as disordered as those of a fluid, but they are
stuck where they were when it cooled. The tale that old window panes are thicker at the bottom because they have flowed
is wrong: they were made uneven, and builders set the heavy edge below.

The committee recommends that the contract be renewed for two years. Costs rose by four percent, which is less than
the sector's average, and complaints fell from sixty-one to twenty-three. The committee notes, however, that response
times at weekends remain above the agreed limit of four hours, and asks for a plan by the end of June.

When the snow melted they found the fence flat on the ground for half a mile. Elk, said the neighbour. Wind, said her
brother. They spent nine days setting new posts, and on the tenth a herd of elk walked out of the trees, looked at the
work with what seemed to be interest, and stepped over it one after another without touching the wire.

A sonnet has fourteen lines, and usually a turn in which the thought changes direction. The form came from Sicily,
travelled through Italy and France, and reached England in the sixteenth century. Poets like it for the same reason that
climbers like a difficult wall: it leaves little room, and every hold has to be found.

Packets that travel over the internet may arrive late, twice, out of order, or not at all. The sender numbers them, the
receiver confirms what it got, and whatever is not confirmed in time is sent again. Out of these simple habits a stream
is made on which programs rely as if a wire ran from one machine to the other.

The clinic opens at eight, but the line begins to form at six. Most people bring something to sit on. There is an order,
which nobody wrote down: mothers with infants first, then those who came on foot from far away, then the rest. The
nurse who unlocks the door has learned not to interfere, because the line is nearly always right.

Every tide pool is a small world with hard borders. Twice a day the sea comes in, brings food and takes waste, and for
the hours between the animals live with what they have. The water grows warm, rain makes it less salty, and oxygen runs
low at night. What survives here is seldom beautiful, but it is never fragile.

We regret to inform you that your parcel was damaged in transit. A refund of 48.50 has been issued to the card that you
paid with and should appear within five working days. You need not return the item. If you would rather have a
replacement, reply to this message before Friday and we will send one free of charge.

The painter mixed her greens herself, from ochre and a blue that was almost black. Tube greens, she said, look like
billiard tables. For thirty years she painted the same hillside behind the barn, and the dealers who came to see her
could never agree whether the pictures were all alike or whether no two of them had anything in common.

Suppose that a test for a rare illness is right in ninety-nine cases of a hundred, and that one person in a thousand
is ill. Of a hundred thousand people, a hundred are ill and ninety-nine of these are found; but of the others, about
a thousand are told that they are ill although they are not. A positive result is therefore wrong far more often than
it is right.

Wool felts because its fibres are covered with scales that catch on one another. Heat, soap and movement make them
creep together, and nothing makes them creep apart. Everyone who has washed a favourite jumper with the towels knows
the result. Boots, hats and the hammers of pianos are made by doing the same thing on purpose.

The train stopped between two stations, in a cutting full of birches. No announcement was made. After a while people
began to talk to each other, then to share what they had: apples, a newspaper, the charge of a telephone. When it moved
again after forty minutes there was something like disappointment in the carriage, and everyone looked outside.

Clocks on satellites run fast by some thirty-eight millionths of a second each day, because gravity is weaker up there,
even though their speed alone would make them slow. It sounds like nothing. Light covers eleven kilometres in that time,
and navigation that ignored the difference would be useless before the first evening.

She taught us to prune in February, when the tree is asleep and its shape can be seen. Take out what is dead, then what
crosses, then what grows inward. Step back after every cut. Leave the tree so open that a bird could fly through it
without folding its wings, and stop while you still want to take one branch more.

The archive holds nine kilometres of shelves, and the fungus had reached three of them. Restorers in white overalls took
each volume out, brushed it page by page and dried it in a tent of filtered air. They worked for two years. In the end
eleven books were lost, all of them copies, and one drawing turned up that nobody had known about.

An index makes reading fast and writing slow. For each row that is added, every index of the table must be changed as
well, and on a busy system that can cost more than the row itself. It is therefore worth asking from time to time which
of them are still used. Those that no query touches are paid for daily and give nothing back.

On the second day the guide stopped joking. The pass was still white, the forecast spoke of thunder in the afternoon,
and one of the group had begun to limp without saying so. They ate standing up. "We can be over by noon," he said, "or
we can be back at the hut for lunch and try tomorrow. I have never regretted the second choice."

Salt lowers the freezing point of water, which is why it is spread on icy roads. Below about minus ten degrees its
effect becomes too small to help, and sand or gravel is used instead, to give tyres something to grip. In spring the
salt ends up in ditches and streams, and roadside trees show brown needles on the side of the traffic.

The orchestra tunes to the oboe, not because its note is the purest but because it is the hardest to change. Its player
looks at a small meter, gives the note, and holds it while the strings slide up and down to meet it. For half a minute a
hundred people want nothing but to agree. Then the hall goes quiet, and they begin to disagree beautifully.

If the motor does not start, check first that the red switch is released and that the guard is fully closed. Wait thirty
seconds after a power cut before trying again. A slow double flash of the lamp means that the filter is blocked; a fast
one means that the machine is too hot and will restart by itself. For any other signal, call the service number.
"""

PASSAGES: tuple[str, ...] = tuple(" ".join(passage.split()) for passage in _PASSAGES.strip().split("\n\n"))

# From the same thing said twice, over what is related, to what has nothing in common.
PAIRS: tuple[tuple[str, str], ...] = (
    ("The shop closes at six.", "The store shuts at six o'clock."),
    ("A boy is feeding ducks at the pond.", "At the pond a boy gives food to the ducks."),
    ("She repaired the roof before winter.", "Before winter came, she fixed the roof."),
    ("The film was far too long.", "The movie went on for much too long."),
    ("He forgot to water the plants.", "He did not remember to give the plants water."),
    ("Prices rose by three percent in May.", "In May, prices went up three percent."),
    ("The bridge is closed to lorries.", "Trucks may not use the bridge."),
    ("Nobody answered the phone.", "The phone rang, but no one picked it up."),
    ("Our flight was cancelled because of fog.", "Fog made the airline cancel our flight."),
    ("The child drew a house with a red door.", "A house with a red door was drawn by the kid."),
    ("Restart the server after the update.", "Once the update is installed, reboot the server."),
    ("The soup needs more salt.", "The soup is not salty enough and a little bland."),
    ("A woman plays the cello on the square.", "A man plays the violin on the square."),
    ("The meeting was moved to Thursday.", "The meeting was cancelled on Thursday."),
    ("Two dogs run along the beach.", "A dog sleeps on the beach."),
    ("The museum opens late on Fridays.", "The library stays open late on Mondays."),
    ("He bought a used bicycle.", "He sold his new motorcycle."),
    ("The vaccine is given in two doses.", "The medicine is taken twice a day."),
    ("Wheat is harvested in July.", "Grapes are picked in September."),
    ("The password must have twelve characters.", "Change your password every three months."),
    ("The river flooded the lower town.", "Heavy rain is expected in the lower town."),
    ("She is learning to play chess.", "She teaches children to play football."),
    ("The kettle is on the stove.", "The kitchen smells of fresh bread."),
    ("The team won in the last minute.", "The coach resigned after the season."),
    ("The novel is set in a small port.", "The harbour was rebuilt after the war."),
    ("Rents in the city keep rising.", "Many families are leaving the city."),
    ("The engine makes a strange noise.", "The car is parked behind the school."),
    ("Bees tell each other where flowers are.", "Honey keeps for many years."),
    ("The judge postponed the trial.", "The lawyer wrote a book about gardens."),
    ("Snow covered the village.", "The village elected a new mayor."),
    ("The program crashed when it read the file.", "The file cabinet is locked."),
    ("He crossed the desert on foot.", "Dessert will be served at nine."),
    ("The bank raised its interest rates.", "They had a picnic on the river bank."),
    ("The choir rehearses on Wednesdays.", "The warranty covers parts and labour."),
    ("A whale was seen near the coast.", "The printer is out of paper."),
    ("The recipe asks for two eggs.", "The glacier has retreated by a mile."),
    ("Turn left at the second light.", "Her thesis is about medieval law."),
    ("The cat is asleep on the piano.", "Exports of steel fell last quarter."),
    ("Tickets are sold at the entrance.", "Mercury is the planet nearest to the sun."),
    ("He is allergic to peanuts.", "The treaty was signed in Vienna."),
)

__all__ = ["PAIRS", "PASSAGES"]
