"""Made-up reviews, by a grammar: synthetic, and labelled as such."""

import numpy as np

from .text import Reviews

_PRAISE = """admirable amusing beautiful brilliant captivating charming clever
compelling dazzling delightful eloquent enchanting engaging excellent exciting exquisite
fresh funny gripping heartfelt hilarious imaginative inspired intelligent lively lovely
masterful memorable moving original perfect poetic powerful radiant refreshing sincere
splendid subtle superb tender thrilling touching warm witty wonderful""".split()
_BLAME = """amateurish annoying awful awkward banal bland boring bloated careless cheap
childish clumsy confused contrived crude dreadful dull empty endless flat foolish forced
forgettable grating hollow incoherent inept irritating lazy lifeless messy mediocre
pointless predictable pretentious ridiculous shallow silly sloppy stale tedious terrible
tiresome trite unbearable""".split()
_ASPECTS = """acting camera cast character climax comedy costume dialogue direction
drama editing ending hero humour music narration opening pacing performance photography
plot premise romance scene score screenplay script setting sound soundtrack story style
suspense theme villain""".split()
_DEGREES = ["", "", "", "really", "truly", "rather", "utterly", "quite"]
_PLACES = """airport attic bridge castle desert farm forest garden harbour hospital
hotel island kitchen library market mountain museum palace prison river school station
street studio theatre tower train tunnel village winter""".split()
_PEOPLE = """actor artist captain clerk cook dancer detective doctor driver farmer
friend gambler judge king lawyer mother neighbour nurse officer painter pilot priest
queen sailor singer sister soldier student teacher thief writer""".split()
_DEEDS = """arrives asks begins calls dances drives escapes fights follows hides laughs
leaves listens meets returns runs sings sleeps speaks travels waits walks watches
works""".split()


def synthetic_reviews(seed: int, count: int) -> Reviews:
    """Made-up reviews whose words follow this grammar:

        review   → 5, 7 or 9 opinions among 4 to 12 facts, in any order
        opinion  → "the" ASPECT "was" DEGREE QUALITY
                 | "the" ASPECT "was not" DEGREE QUALITY        (one in five)
        fact     → "the" PERSON DEED "in the" PLACE

    QUALITY is one of 45 words of praise or 45 of blame, the n-th of them chosen in
    proportion to 1/n; "not" turns it round. A review praises where more than half of
    its opinions do. Opinions agree with the reviewer's mind three times in four.

    **Arguments:**

    - `seed`: the same reviews for the same seed; the first ones, for a smaller `count`.
    - `count`: how many.

    **Returns:** the reviews, of `data` "synthetic reviews (a grammar)".
    """
    rng = np.random.default_rng(seed)

    def one(words):
        return words[rng.integers(len(words))]

    chance = {}
    for words in (_PRAISE, _BLAME):
        weights = 1 / np.arange(1, len(words) + 1)
        chance[id(words)] = np.cumsum(weights) / weights.sum()

    def opinion(praise: bool) -> str:
        turned = rng.random() < 0.2
        words = _PRAISE if praise != turned else _BLAME
        quality = words[int(np.searchsorted(chance[id(words)], rng.random()))]
        parts = ("the", one(_ASPECTS), "was not" if turned else "was", one(_DEGREES))
        return " ".join([*filter(None, parts), quality])

    def fact() -> str:
        return f"the {one(_PEOPLE)} {one(_DEEDS)} in the {one(_PLACES)}"

    texts, labels = [], []
    for _ in range(count):
        mind = rng.random() < 0.5
        opinions = [bool(mind == (rng.random() < 0.75)) for _ in range(one([5, 7, 9]))]
        sentences = [opinion(praise) for praise in opinions]
        sentences += [fact() for _ in range(rng.integers(4, 13))]
        rng.shuffle(sentences)
        texts.append(". ".join(sentences) + ".")
        labels.append(int(2 * sum(opinions) > len(opinions)))
    return Reviews(texts, np.array(labels), "synthetic reviews (a grammar)")
