"""Texts that data may hold and that act in one medium or another instead of being read."""

HOSTILE = {
    "html": "<script>alert(1)</script> & &amp; &#60; <b>bold</b> <img src=x onerror=alert(1)> </div></main>",
    "markdown": "*em* _em_ **b** __b__ `code` ``` [a](http://x) ![i](y) | cell | ~~gone~~ <http://z> \\* vit_base ## #",
    "heading": "# one",
    "numbered": "12) one",
    "definition": "[x]: http://y",
    "markup": "[bold red]x[/] [/] [link=http://x]y[/link] \\[dim]z {braces} {{ 7 * 7 }} {% x %}",
    "lines": "one\ntwo\r\nthree\rfour\u2028five\x85six\tseven",
    "control": "\x1b[31mred\x1b]0;title\x07\x08\x00\x9b1m",
    "emoji": "👩‍👩‍👧 🦄",
    "right to left": "שלום \u202eevil\u202c مرحبا",
    "half characters": "half \ud83d and \udc00",
    "backslash": "ends with \\",
    "one word": "W" * 1_000_000,
    "many words": "$a_b [x](y) <b> " * 60_000,
}
