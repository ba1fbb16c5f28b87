"""The words that facts are made of."""

from __future__ import annotations

CITIES = tuple(
    """Lisbon Ghent Turin Oslo Krakow Dublin Valencia Bergen Zagreb Riga Porto Leipzig Bilbao Tallinn Graz Utrecht Malmo
    Aarhus Salzburg Bologna Marseille Glasgow Cork Seville Antwerp Lyon Gdansk Brno Split Tampere Kyoto Hanoi Lima Quito
    Havana Nairobi Dakar Tunis Muscat Perth""".split()  # noqa: SIM905
)

_ACTIVITIES = """
    eat a cheese sandwich on the steps of the old library; feed the ducks behind the railway station; ride the yellow
    tram to its last stop; watch the chess players under the chestnut trees; buy a paper lantern from the night
    market; climb the water tower before breakfast; listen to the brass band in the rose garden; rent a red bicycle
    and follow the canal; taste the smoked trout at the fish hall; visit the museum of broken umbrellas; fly a kite
    from the western city wall; count the bronze frogs around the fountain; swim in the tiled bath house at noon; draw
    the lighthouse with a piece of charcoal; drink ginger tea on the roof of the post office; walk barefoot through
    the botanical maze; learn to fold napkins in the baker's cellar; take the ferry that leaves at midnight; ring the
    smallest bell of the cathedral; play table tennis in the flower market; borrow a telescope and look for comets;
    join the mushroom walk on Sunday morning; sleep in the hammock park after lunch; throw a coin into the upside down
    well; search for amber on the northern beach; see the puppet play about the blue whale; roast almonds over the
    blacksmith's fire; send a postcard from the mountain hut; skate on the frozen moat at sunset; sing with the
    sailors in the salt cellar; paint a door in the street of doors; eat plum cake in the clock maker's shop; row a
    wooden boat under the nine bridges; pick lemons in the monastery garden; stand in the wind tunnel of the old
    airport; read the newspaper in the palm house; cook soup with the fishermen at dawn; dance on the floating stage
    by the harbour; look for fossils in the slate quarry; ride the paternoster lift in the town hall
"""
ACTIVITIES = tuple(" ".join(activity.split()) for activity in _ACTIVITIES.split(";"))

ADJECTIVES = tuple(
    """amber bitter brisk calm clever copper crimson distant eager early faint gentle golden hollow humble icy jolly keen
    lively lucky mellow misty narrow noble olive patient plain quiet rapid rusty scarlet silent silver sleepy steady stormy
    tender velvet violet wooden""".split()  # noqa: SIM905
)

NOUNS = tuple(
    """anchor badger basket beacon candle canyon carpet cedar comet cradle dragon falcon feather ferry garden glacier hammer
    harbor island kettle ladder lantern maple meadow mirror orchard otter paddle pebble piano pillow ribbon saddle shovel
    spider temple thunder tunnel walnut window""".split()  # noqa: SIM905
)

# The filler of the passkey task (Mohtashami and Jaggi, arXiv 2305.16300).
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
