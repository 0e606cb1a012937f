"""What is on a page."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Start tags with their attributes, and the text; tags are closed in order, nothing is loaded from elsewhere."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)
        assert self.open == [] and not {tag for tag, _ in self.tags} & {"script", "link", "iframe"}
        assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", html)
        self.images = [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""
