"""Captions: too short, too long, or words that a program put where a description should be.

Always holds: the caption is normalised; words are what white space separates, so a language written without spaces has
few; a caption that says anything beside the stock phrase, the address or the file name is kept.

Boilerplate is a closed list, for a classifier would drop what it does not know: single words and phrases that stand for
a missing description (STOCK), the same with a number ("Image 3 of 12"), and dates ("photographed on 3 May 2014", the
example of Ramesh et al. 2021, appendix C).
"""

from __future__ import annotations

import re

from data_pipeline.filters.thresholds import Facts, Thresholds


def _phrases(text: str) -> frozenset[str]:
    """Phrases between bars."""
    return frozenset(" ".join(phrase.split()) for phrase in text.split("|"))


STOCK = _phrases(
    """
    image | images | img | photo | photos | photograph | picture | pictures | pic | pics | thumbnail | thumb | icon
    | logo | banner | slide | slideshow | gallery | avatar | placeholder | screenshot | figure | untitled | unnamed
    | unknown | no title | title | caption | alt | alt text | null | none | undefined | nan | n a | loading | close
    | menu | search | home | play | next | previous | default | spacer | blank | test
    | image for | image of | images for | images of | photo for | photo of | photos of | picture for | picture of
    | pictures of | pic of | thumbnail for | thumbnail of | image by | photo by | courtesy | photo credit
    | image credit | image source | image may contain | image result for
    | thumbnail image | featured image | main image | main photo | cover image | cover photo | product image
    | product photo | post image | article image | blog image | header image | hero image | background image
    | default image | preview image | gallery image | slider image | stock image | stock photo | sample image
    | profile picture | profile photo | profile image | user avatar | user image
    | no image | no photo | no picture | no image available | no photo available | no picture available
    | image not available | image not found | image unavailable | image coming soon | photo coming soon
    | image placeholder | placeholder image
    | click to enlarge | click here to enlarge | click to view larger image | view larger image | view full size
    | enlarge image | zoom image | show image | view image | open image
    | getty images | shutterstock | istock | advertisement | powered by
    | a picture | a photo | an image | the image | the picture | my picture | this is an image | this is a picture
    | this is a photo
    """
)

_NUMBER_WORDS = _phrases("of|from|no|x")  # "image no 3", "photo 2 of 7", "untitled 640 x 480"
_DONE = _phrases("photographed|taken|uploaded|posted|published|created|added|updated")
_DATE_WORDS = _phrases(
    """
    on|at|in|the|am|pm|jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec|january|february|march|april|june|july
    |august|september|october|november|december|monday|tuesday|wednesday|thursday|friday|saturday|sunday
    """
)
_NUMBER = re.compile(r"\d+(?:x\d+)?")
_DAY = re.compile(r"\d{1,4}(?:st|nd|rd|th)?")

_EXTENSION = r"\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|avif|heic|jp2|ico|psd|raw|cr2|nef)"
# What cameras, phones and scanners call their files.
_CAMERA = (
    r"(?:_?dsc[nf]?|_?img|_mg|imag|pict?|mvi|gopr|gopro|pano|scan|screenshot|screen shot|cimg|dji)"
    r"[ _-]?\d{3}[\d _.-]*(?:at \d[\d. ]*)?"
)
_FILENAME = re.compile(rf"(?:\S+{_EXTENSION}|{_CAMERA}(?:\(\d+\))?(?:{_EXTENSION})?|[0-9a-f]{{16,}})", re.IGNORECASE)

_DOMAINS = "com|net|org|info|biz|edu|gov|io|co|de|uk|fr|it|es|nl|pl|ru|jp|cn|br|au|ca|in|eu|us|me|tv"
_HOST = rf"[\w-]+(?:\.[\w-]+)*\.(?:{_DOMAINS})(?:/\S*)?"
_URL = re.compile(rf"(?:(?:https?|ftp|file)://\S+|(?:data|mailto):\S+|//\S+|www\.\S+|{_HOST})", re.IGNORECASE)


def caption_length(facts: Facts, limits: Thresholds) -> str | None:
    if len(facts.caption) < (limits.min_caption or 0):
        return "caption_too_short"
    if limits.max_caption is not None and len(facts.caption) > limits.max_caption:
        return "caption_too_long"
    return None


def caption_words(facts: Facts, limits: Thresholds) -> str | None:
    if limits.min_words is None and limits.max_words is None:
        return None
    words = len(facts.caption.split())
    if words < (limits.min_words or 0):
        return "caption_too_few_words"
    if limits.max_words is not None and words > limits.max_words:
        return "caption_too_many_words"
    return None


def boilerplate(facts: Facts, limits: Thresholds) -> str | None:
    if not limits.drop_boilerplate:
        return None
    if _URL.fullmatch(facts.caption):
        return "caption_url"
    if _FILENAME.fullmatch(facts.caption):
        return "caption_filename"
    return "caption_boilerplate" if _is_stock(facts.caption) else None


def _is_stock(caption: str) -> bool:
    words = re.sub(r"[\W_]+", " ", caption.casefold()).split()
    if words and words[0] in _DONE:
        return all(word in _DATE_WORDS or _DAY.fullmatch(word) for word in words[1:])
    if " ".join(words) in STOCK:
        return True
    while words and (_NUMBER.fullmatch(words[-1]) or words[-1] in _NUMBER_WORDS):
        words.pop()
    return not words or " ".join(words) in STOCK
