"""Which language a text is in, guessed by its script and, in Latin letters, by its most common words.

Meant for tables of many texts. A text without any of the words, such as a name or a number, is of no known language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

UNKNOWN = "unknown"
# Of scripts that several languages share, the script is named
_SCRIPTS = {
    "CYRILLIC": "Cyrillic script", "GREEK": "Greek", "ARABIC": "Arabic script", "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari script", "BENGALI": "Bengali", "TAMIL": "Tamil", "THAI": "Thai", "HANGUL": "Korean",
    "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Chinese",
}  # fmt: skip
UNSPACED = frozenset({"Chinese", "Japanese", "Thai"})
_COMMON = {
    "English": "the of and to in is you that it was for on are with as at be this have from or what how my where when"
    " can do does which who why your not if will would please i we he she his her they a an there has me",
    "German": "der die das und ist ich nicht ein eine zu den mit auf für von im sich dem wie was wo kann mein meine wir"
    " sie es wann warum bitte habe hat werden auch nach bei aus oder des dass",
    "French": "le la les des et est un une que qui dans pour pas je vous nous il elle ce sur au avec mon ma mes où"
    " quand comment quel quelle sont plus du ne se à être",
    "Spanish": "el la los las y es un una que en de por con para no se su mi dónde cuándo cómo qué está al lo como más"
    " pero del yo usted puedo hay son",
    "Italian": "il lo la gli le e è un una che di in per con non sono mi dove quando come il mio della del nel alla"
    " cosa più si ho posso quale anche questo",
    "Portuguese": "o a os as e é um uma que em de do da para com não se meu minha onde quando como no na por mais está"
    " você eu ao dos das qual são",
    "Dutch": "de het een en is van ik niet dat in op te zijn met voor mijn wat waar hoe kan u je wij aan er ook naar "
    "bij heeft deze wanneer waarom",
    "Polish": "i w na z jest nie się to że do jak co gdzie kiedy mój moja czy dla o po są ale jestem mogę ten ta przez",
    "Swedish": "och är en ett att det som på jag inte för med av till den var hur när min mitt kan har om vad vi du",
    "Turkish": "ve bir bu ne için ile mi mı nasıl nerede zaman benim var yok değil çok da de ben sen hangi olarak",
}  # fmt: skip
_OF_WORD: dict[str, list[str]] = {}
for _language, _words in _COMMON.items():
    for _word in _words.split():
        _OF_WORD.setdefault(_word, []).append(_language)
# Histograms count by place: only ever added to at the end, and at most PLACES
NAMES = (
    UNKNOWN, "English", "German", "French", "Spanish", "Italian", "Portuguese", "Dutch", "Polish", "Swedish", "Turkish",
    "Cyrillic script", "Greek", "Arabic script", "Hebrew", "Devanagari script", "Bengali", "Tamil", "Thai", "Korean",
    "Japanese", "Chinese",
)  # fmt: skip
PLACES = 32
_READ = 500  # characters from the start


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split()[0]


def guess(text: str) -> str:
    """The language's English name, a script's name, or `UNKNOWN`."""
    seen = text[:_READ]
    if not seen.isascii():
        letters = Counter(map(_script, filter(str.isalpha, seen)))
        if not letters:
            return UNKNOWN
        if letters["HIRAGANA"] + letters["KATAKANA"] > 0.1 * letters.total():
            return "Japanese"
        script = letters.most_common(1)[0][0]
        if script != "LATIN":
            return _SCRIPTS.get(script, UNKNOWN)
    hits: dict[str, int] = {}
    for word in re.findall(r"[^\W\d_]+", seen.casefold()):
        for language in _OF_WORD.get(word, ()):
            hits[language] = hits.get(language, 0) + 1
    if not hits:
        return UNKNOWN
    most = max(hits.values())
    best = [language for language in _COMMON if hits.get(language) == most]
    return best[0] if len(best) == 1 or (best[0] == "English" and most > 1) else UNKNOWN
