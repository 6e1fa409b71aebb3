"""How URLs are shown: whatever their user, password and query are, no more of these than of nothing."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.api.wire import parse_callback_url
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.urls import shown_field, shown_json, shown_line, shown_text, shown_url

# Upper case stands for what must not be seen: no other part of these URLs has any.
SECRET = st.text(string.ascii_uppercase + "!$&'()*+,;=:%", min_size=1, max_size=12)
USER = st.builds("{}:{}@".format, SECRET, SECRET) | SECRET.map("{}@".format) | st.just("")
PATH = st.sampled_from(["", "/", "/done", "/a/b"])
QUERY = SECRET.map("?t={}".format) | SECRET.map("#{}".format) | st.just("")
URL = st.builds("{}://{}h.example{}{}{}".format, st.sampled_from(["http", "https", "x"]), USER, PATH, PATH, QUERY)


def assert_hidden(shown: str) -> None:
    assert not set(shown) & set(string.ascii_uppercase), shown


@given(URL)
def test_no_secret_of_a_url_is_shown_alone_in_a_text_or_in_json(url: str) -> None:
    assert_hidden(shown_url(url))
    assert "h.example" in shown_url(url)
    for text in (f"cannot reach {url}: refused", f"x={url!r}", f'"{url}" and {url}'):
        assert_hidden(shown_text(text))
        assert_hidden(shown_json({"a": [text]})["a"][0])
        assert_hidden(AgentError(Code.BAD_QUERY, text).message)


@given(st.text(string.ascii_uppercase + ' \t"<>@:', min_size=1), st.sampled_from(["sendCommandUrl", "url"]))
def test_a_field_that_is_a_url_hides_secrets_with_blanks_and_quotes_in_them(secret: str, name: str) -> None:
    for url in (
        f"http://{secret}@h.example/done",
        f"http://h.example/done?{secret}",
        f"http://u:{secret}@h.example?{secret}",
    ):
        assert_hidden(shown_field(name, url))
        assert_hidden(shown_json({"request": [{name: url}]})["request"][0][name])


@given(st.sampled_from(["http:/", "http:", "", "http:\\\\", "http:// "]), USER, QUERY)
def test_a_callback_url_that_is_none_is_refused_without_its_secrets(scheme: str, user: str, query: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_callback_url(f"{scheme}{user}h/done{query}")
    assert_hidden(caught.value.message.replace("URL", ""))


@given(QUERY)
def test_a_library_s_request_line_is_shown_without_its_query(query: str) -> None:
    if query.startswith("?"):
        assert_hidden(shown_line(f'http://h:80 "post /done{query} http/1.1" 200'.replace("'", "")))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:p@h:80/done?token=s#f", "http://h:80/done"),
        ("https://h/a", "https://h/a"),
        ("none", "none"),
        ("http://a@b:c@h/x", "http://h/x"),
        ("http://u:p/w@h/x", "http://...@h/x"),
        ("unix:///run/kvmagent/kvmagent.sock", "unix:///run/kvmagent/kvmagent.sock"),
    ],
)
def test_what_is_left_says_where_it_leads(url: str, shown: str) -> None:
    assert shown_url(url) == shown
