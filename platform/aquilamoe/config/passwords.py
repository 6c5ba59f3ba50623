"""Passwords in a configuration: found once, and masked in all that is kept, sent or shown.

Secret are: the password in a URL, and a user name alone, which is a token, unless it is of a database or of SSH; what
a query or a key calls password, token, secret or key; and whatever is below `env_vars`. Once found, a password is known
by its text, so that messages of libraries are masked too, wherever they cut a URL.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any
from urllib.parse import quote, quote_plus, unquote

MASK = "***"
SHORTEST = 4  # characters of what is masked wherever it stands; shorter ones are parts of ordinary words
VARIABLES = "env_vars"
FREE = "columns"  # of a corpus: its keys are names in files
LEAST_VARIABLE = 6  # characters; `1` and `true` stand in many texts
ANYWHERE, LAST = "password|passwd|passphrase|secret|credential|odbc_connect", "token|key|auth|pass|pwd|signature|sig"
SECRET = rf"[\w.-]*(?:{ANYWHERE})[\w.-]*|[\w.-]*(?:{LAST})"
NAME = re.compile(rf"(?i)(?:{SECRET})")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# In a query; the one named here is MLflow's name for a view of its pages.
SETTING = re.compile(rf"(?i)((?:^|[?&;])(?!viewStateShareKey=)(?:{SECRET})=)([^&;]+)")
# In a word of a command line: `{{env_vars: {{A_TOKEN: x}}}}`.
WRITTEN = re.compile(rf"(?i)(?<![\w-])((?:{SECRET})\s*[:=]\s*)([^,}}&;]+)")
IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s\"'<>`]+)")
NAMED_USERS = ("postgresql", "mysql", "mssql", "sqlite", "ssh", "git+ssh", "sftp")  # schemes whose user is no token
NO_LOGIN = ("sqlite:///", "file:///", "package://", "python://")
NO_PASSWORD = ("", "x-oauth-basic")  # then the user name is the secret

_known: dict[str, None] = {}  # texts that are masked wherever they stand


def learn(values: Any) -> None:
    """Register the passwords of a configuration for `without_passwords`."""
    for secret in _secrets(values):
        for form in _forms(secret):
            _known[form] = None


def learn_words(words: list[str]) -> None:
    """Register those of a command line, before it is parsed."""
    for word in words:
        key, _, value = word.partition("=")
        learn(dict.fromkeys((key.rpartition(".")[2], VARIABLES if f".{VARIABLES}." in key else ""), value))
        learn(word)
        for found in WRITTEN.finditer(value):
            learn({"password": found[2].strip("'\" ")})


def without_passwords(text: str) -> str:
    """The text with `***` for every known password, and for that of every URL in it."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return IN_TEXT.sub(lambda match: _masked_text(match[0]), text) if "://" in text else text


def masked(values: Any, key: str = "") -> Any:
    """A copy of a configuration without passwords."""
    if isinstance(values, Mapping):
        if key == VARIABLES:
            return dict.fromkeys(values, MASK)
        return {name: value if name == FREE else masked(value, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [masked(value, key) for value in values]
    if NAME.fullmatch(key) and isinstance(values, str | int | float) and not isinstance(values, bool):
        return MASK
    return _masked_text(values) if isinstance(values, str) else values


def has_password(url: str) -> bool:
    """Whether there is anything in a URL that is masked."""
    return _masked_text(url) != url


def login(url: str) -> tuple[str, str | None, str]:
    """Scheme with `://`, what stands before the `@` (None: nothing does), and the rest of one URL.

    A password may have any character: what stands before the last `@` belongs to it, unless that is in a path.
    """
    scheme = SCHEME.match(url)
    if scheme is None or url.startswith(NO_LOGIN):
        return (scheme[0] if scheme else ""), None, url[scheme.end() if scheme else 0 :]
    rest = url[scheme.end() :]
    user, at, host = rest.rpartition("@")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    is_web = scheme[0].startswith(("http", "git", "ftp"))
    is_token = is_web and "?" not in user and "." not in authority and authority != "localhost"
    is_login = "@" in authority or ":" in authority or is_token
    return (scheme[0], user, host) if at and is_login else (scheme[0], None, rest)


def encoded(url: str) -> str:
    """The URL with a login that every library reads alike, whatever characters are in its password."""
    scheme, user, rest = login(url)
    if user is None:
        return url
    name, colon, password = user.partition(":")
    return f"{scheme}{_encoded(name)}{colon}{_encoded(password)}@{rest}"


def _encoded(part: str) -> str:
    return re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", quote(part, safe="%"))


def _masked_text(text: str) -> str:
    return "".join(_masked_url(part) for part in _urls(text))


def _urls(text: str) -> list[str]:
    """The text, cut before every URL in it."""
    starts = [found.start() for found in SCHEME.finditer(text)]
    return [text[start:stop] for start, stop in zip([0, *starts], [*starts, len(text)], strict=True)]


def _masked_url(url: str) -> str:
    if not SCHEME.match(url):
        return url
    path, mark, query = url.partition("?")
    scheme, user, rest = login(f"{path}{mark}{SETTING.sub(lambda match: f'{match[1]}{MASK}', query)}")
    if user is None:
        return f"{scheme}{rest}"
    name, colon, password = user.partition(":")
    if secret := _secret_of(scheme, user):
        user = f"{name}{colon}{MASK}" if password == secret else MASK
    return f"{scheme}{user}@{rest}"


def _secret_of(scheme: str, user: str | None) -> str:
    """The part of a login that is secret."""
    name, colon, password = (user or "").partition(":")
    if password not in NO_PASSWORD:
        return password
    is_name = not colon and scheme.partition("+")[0].removesuffix("://") in NAMED_USERS
    return "" if is_name or scheme.removesuffix("://") in NAMED_USERS else name


def _secrets(values: Any, key: str = "", below_variables: bool = False) -> Iterator[str]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name != FREE:
                yield from _secrets(value, str(name), below_variables or key == VARIABLES or name == VARIABLES)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _secrets(value, key, below_variables)
    elif isinstance(values, str | int | float) and not isinstance(values, bool):
        text = str(values)
        is_variable = below_variables and len(text) >= LEAST_VARIABLE and not re.fullmatch(r"[\d.]+|/.*", text)
        if NAME.fullmatch(key) or is_variable:
            yield text
        for part in _urls(text):
            path, mark, query = part.partition("?")
            scheme, user, _ = login(f"{path}{mark}{SETTING.sub('', query)}")
            yield _secret_of(scheme, user)
            yield from (found[2] for found in SETTING.finditer(query if SCHEME.match(part) else ""))


def _forms(secret: str) -> set[str]:
    """A password as it may be written in files, addresses, command lines and messages."""
    forms = {secret.encode("unicode_escape").decode(), _encoded(secret)}
    for text in (secret, unquote(secret)):
        forms |= {text, quote(text), quote(text, safe=""), quote_plus(text), escape(text), repr(text)[1:-1]}
        forms |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        forms |= {shlex.quote(text).strip("'"), text.replace("'", "\\'")}
    return {form for form in forms if len(form) >= SHORTEST and form.strip("*")}
