"""Personal data out of texts: e-mail, phone, IP address, credit card, IBAN, each replaced by a typed placeholder.

Cheap patterns find candidates, arithmetic decides: Luhn's digit for cards (ISO/IEC 7812), the remainder of 97 for IBANs
(ISO 13616), the count of digits for phones (ITU-T E.164). Names and postal addresses are not found: that needs a model.
"""

import ipaddress
import re
from collections.abc import Callable

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[a-zA-Z0-9-]{1,63}\.)+[a-zA-Z]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
_IBAN_LENGTHS = {
    "AD": 24,
    "AE": 23,
    "AL": 28,
    "AT": 20,
    "AZ": 28,
    "BA": 20,
    "BE": 16,
    "BG": 22,
    "BH": 22,
    "BR": 29,
    "BY": 28,
    "CH": 21,
    "CR": 22,
    "CY": 28,
    "CZ": 24,
    "DE": 22,
    "DK": 18,
    "DO": 28,
    "EE": 20,
    "EG": 29,
    "ES": 24,
    "FI": 18,
    "FO": 18,  # codespell:ignore fo
    "FR": 27,
    "GB": 22,
    "GE": 22,
    "GI": 23,
    "GL": 18,
    "GR": 27,
    "GT": 28,
    "HR": 21,
    "HU": 28,
    "IE": 22,
    "IL": 23,
    "IQ": 23,
    "IS": 26,
    "IT": 27,
    "JO": 30,
    "KW": 30,
    "KZ": 20,
    "LB": 28,
    "LC": 32,
    "LI": 21,
    "LT": 20,
    "LU": 20,
    "LV": 21,
    "LY": 25,
    "MC": 27,
    "MD": 24,
    "ME": 22,
    "MK": 19,
    "MR": 27,
    "MT": 31,
    "MU": 30,
    "NL": 18,
    "NO": 15,
    "PK": 24,
    "PL": 28,
    "PS": 29,
    "PT": 25,
    "QA": 29,
    "RO": 24,
    "RS": 22,
    "SA": 24,
    "SC": 31,
    "SE": 24,
    "SI": 19,
    "SK": 24,
    "SM": 27,
    "ST": 25,
    "SV": 28,
    "TL": 23,
    "TN": 24,
    "TR": 26,
    "UA": 29,
    "VA": 22,
    "VG": 24,
    "XK": 20,
}
_IP4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{1,4}(?![\w:])")
_LOCAL = [
    ipaddress.ip_network(net) for net in ("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
]
_LONG_NUMBER = re.compile(r"(?<![\w.,/:=-])\+?\(?\d(?:[ .()-]{0,2}\d){6,18}(?![\w]|[.,:/-]\d)")
_PHONES = [
    re.compile(r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}"),  # +34 612 345 678, +44 (20) 7946 0958
    re.compile(r"(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}"),  # 780-800-7092, (415) 555-0199
    re.compile(r"\(?0\d{1,4}\)?[ -]\d{3,4}[ -]?\d{3,4}(?:[ -]?\d{2,3})?"),  # 020 7946 0958, 010-12345678
    re.compile(r"0\d(?:[ .]\d{2}){4}"),  # 01 23 45 67 89
    re.compile(r"1[3-9]\d[ -]?\d{4}[ -]?\d{4}"),  # 13812345678
    re.compile(r"[67]\d{2}[ -]\d{3}[ -]\d{3}"),  # 612 345 678, Spain's mobiles
    re.compile(r"\d{3}-\d{4}"),  # 555-0199, after a word that says so
]
_NAMED_PHONE = re.compile(
    r"(?:phone|tel[.:e]|call|mobile|fax|m\u00f3vil|llam\w+|\u7535\u8bdd|\u624b\u673a)\W{0,3}(?:\w+\W{1,2}){0,2}$",
    re.IGNORECASE,
)
_SURE = 5
"""So many of the patterns need no word before them."""
_CARD_LENGTHS = {"3": {14, 15, 16}, "4": {13, 16, 19}, "5": {16}, "6": {16, 19}, "2": {16}}


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """Return the text with placeholders as [EMAIL], and how many of each kind were put in."""
    counts: dict[str, int] = {}

    def put(name: str) -> str:
        counts[name] = counts.get(name, 0) + 1
        return f"[{name}]"

    if "@" in text:
        text = _EMAIL.sub(lambda match: put("EMAIL"), text)
    if any(digit in text for digit in "0123456789"):
        text = _IBAN.sub(lambda match: _iban(match.group(), put), text)
        text = _IP4.sub(lambda match: put("IP") if _is_public(match.group()) else match.group(), text)
        if "::" in text or text.count(":") > 6:
            text = _IP6.sub(lambda match: put("IP") if _is_public(match.group()) else match.group(), text)
        text = _LONG_NUMBER.sub(lambda match: _number(match, put), text)
    return text, counts


def _iban(found: str, put: Callable[[str], str]) -> str:
    """A candidate may run on into the next word: cut it to the length of its country."""
    n_wanted = _IBAN_LENGTHS.get(found[:2], 0)
    ends = [end for end, _ in enumerate(found, 1) if sum(map(str.isalnum, found[:end])) == n_wanted]
    if not ends or found[ends[0] : ends[0] + 1].isalnum():
        return found
    return put("IBAN") + found[ends[0] :] if is_iban(found[: ends[0]]) else found


def is_iban(text: str) -> bool:
    """Say whether this is an IBAN of a known country, of its length and with the right check digits."""
    letters = re.sub(r"[ -]", "", text)
    if not letters.isalnum() or not letters.isascii() or len(letters) != _IBAN_LENGTHS.get(letters[:2]):
        return False
    return int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """Say whether the digits are a card number: a known first digit and length, and Luhn's sum."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    if len(digits) not in _CARD_LENGTHS.get(str(digits[0]) if digits else "", ()) or len(set(digits)) == 1:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6:
        return not (address.is_loopback or address.is_unspecified or address.is_link_local)
    return not any(address in network for network in _LOCAL) and text != "255.255.255.255"


def _number(match: re.Match[str], put: Callable[[str], str]) -> str:
    found = match.group()
    if is_card(found) and not re.search(r"[.()+]", found):
        return put("CARD")
    if not 7 <= sum(map(str.isdigit, found)) <= 15:
        return found
    named = _NAMED_PHONE.search(match.string[max(0, match.start() - 40) : match.start()])
    sure = any(pattern.fullmatch(found) for pattern in _PHONES[:_SURE])
    said = named and any(pattern.fullmatch(found) for pattern in _PHONES[_SURE:])
    return put("PHONE") if sure or said else found
