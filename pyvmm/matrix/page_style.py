"""The style of the page about a matrix: light and dark, from a phone's width on."""

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2128; --dim: #5d6673;
  --edge: #d9dde3; --good: #1a7f4b; --good-back: #dcf3e6; --bad: #b3261e; --bad-back: #fbe3e1;
  --idle: #5d6673; --idle-back: #e9ecf0; --ground: #e9ecf0; --mark: #ffd9d5; --link: #1f5fbf;
  --p0: #8b95a3; --p1: #3f78c9; --p2: #2a9d8f; --p3: #9a6fc0; --p4: #e09f3e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2127; --text: #e4e8ed;
  --dim: #9aa4b1; --edge: #333a43; --good: #6fd3a0; --good-back: #173828; --bad: #ff9b92;
  --bad-back: #4a1f1c; --idle: #9aa4b1; --idle-back: #2b3139; --ground: #2b3139; --mark: #6b2a25;
  --link: #8ab4f8; --p0: #7d8896; --p1: #6ea0e8; --p2: #4fbfb0; --p3: #b995d8; --p4: #e9b35f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; }
h2 { margin: 0 0 .5rem; font-size: 1.05rem; }
p { margin: .4rem 0; }
a { color: var(--link); }
header, section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: 1rem 1.2rem; margin: 0 0 1rem; }
header { border-top: 5px solid var(--good); }
header.bad { border-top-color: var(--bad); }
.card { border-left: 5px solid var(--bad); }
.name { font-family: ui-monospace, monospace; font-weight: 600; }
.facts { color: var(--dim); font-size: .87rem; }
.facts b { color: var(--text); }
.message { font-weight: 600; }
.note { color: var(--bad); }
.chip { display: inline-block; border-radius: 1rem; padding: .05rem .65rem; font-size: .82rem;
  font-weight: 600; white-space: nowrap; }
.chip.good { color: var(--good); background: var(--good-back); }
.chip.bad { color: var(--bad); background: var(--bad-back); }
.chip.idle { color: var(--idle); background: var(--idle-back); }
a > .chip { text-decoration: underline; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .87rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin-right: .35rem; vertical-align: -1px; }
.line { display: block; width: 100%; height: 16px; border-radius: 3px; }
.ground { fill: var(--ground); }
.p0 { fill: var(--p0); background: var(--p0); } .p1 { fill: var(--p1); background: var(--p1); }
.p2 { fill: var(--p2); background: var(--p2); } .p3 { fill: var(--p3); background: var(--p3); }
.p4 { fill: var(--p4); background: var(--p4); } .p9 { fill: var(--dim); }
.bad > svg .bad, svg .bad { fill: var(--bad); }
pre { margin: .4rem 0 0; padding: .7rem; background: var(--back); border: 1px solid var(--edge);
  border-radius: 6px; font: 12px/1.45 ui-monospace, monospace; white-space: pre-wrap; }
mark { background: var(--mark); color: inherit; display: block; font-weight: 600; }
summary { cursor: pointer; margin-top: .5rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th { text-align: left; color: var(--dim); font-weight: 600; overflow-wrap: normal; }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--edge);
  vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.time { width: 34%; }
.logs { font-size: .82rem; }
.ruler { position: relative; height: 1.3rem; font-weight: 400; font-size: .8rem; }
.ruler span { position: absolute; }
.ruler .unit { right: 0; }
@media (max-width: 50rem) {
  body { padding: .5rem; }
  header, section { padding: .8rem; }
  table, tbody, tr, td { display: block; width: 100%; }
  thead { display: none; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--edge); }
  tr:last-child { border-bottom: 0; }
  td { display: inline-block; width: auto; border: 0; padding: .05rem .9rem .05rem 0; }
  td.verdict, td.time, td.logs { display: block; width: 100%; padding: .15rem 0; }
  td[data-head]::before { content: attr(data-head) " "; color: var(--dim); font-size: .8rem; }
  td[data-head]:empty { display: none; }
}
"""
