"""The style sheet of a report: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1d1d1b;--soft:#5f5e5a;--rule:#e4e3df;--grid:#ecebe8;
--link:#1f62b5;--good:#0f7a52;--bad:#b3371b;--s1:#2a78d6;--s2:#e0662f;--s3:#189a66;--s4:#7a5cc9}
@media(prefers-color-scheme:dark){:root{--page:#171716;--card:#1f1f1d;--ink:#efeeea;--soft:#a9a8a2;--rule:#363633;
--grid:#2b2b29;--link:#7db4f2;--good:#4cc38f;--bad:#f0866a;--s1:#4a93e8;--s2:#ee8250;--s3:#3cba83;--s4:#9f86e6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
overflow-wrap:break-word;-webkit-text-size-adjust:100%}
main,header,footer,nav{max-width:1040px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:44px 0 14px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:1.02rem;margin:26px 0 10px}
h4{font-size:.92rem;margin:0 0 6px;font-weight:600}
p{margin:0 0 10px;max-width:44rem}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
nav{padding-top:10px;font-size:.92rem}nav a{margin-right:16px;white-space:nowrap}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em}
code{color:var(--soft)}
.soft,.unit,.note{color:var(--soft);font-weight:400}.note{font-size:.88rem}
.unknown{color:var(--soft);font-style:italic}
.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(3,1fr);gap:12px;margin:22px 0 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:13px 15px}
.tile .label{font-size:.84rem;color:var(--soft)}
.tile .value{font-size:1.6rem;line-height:1.25;font-weight:600;letter-spacing:-.02em}
.tile .value .unit{font-size:.9rem;letter-spacing:0;white-space:nowrap}
.tile .value.unknown{font-size:1.15rem;line-height:1.74;font-weight:400}
.tile .under{font-size:.84rem;color:var(--soft)}
.scroll{overflow-x:auto;margin:0 0 14px}
table{border-collapse:collapse;font-size:.92rem;min-width:100%}
th{font-weight:600;text-align:left;color:var(--soft);font-size:.84rem;border-bottom:1px solid var(--rule)}
th,td{padding:7px 18px 7px 0;vertical-align:top}
tbody td,tbody th{border-bottom:1px solid var(--grid)}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.long{max-width:30rem}
th:last-child,td:last-child{padding-right:0}
table.facts th{font-weight:400;font-size:.92rem;width:10.5rem;border-bottom:1px solid var(--grid)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:0 36px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,390px),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:13px 15px}
svg{display:block;max-width:100%;height:auto;font-family:inherit}
figure svg{width:100%}
.graph svg{max-width:none;margin:0 auto}.charts+.note,.charts+.bad{margin-top:10px}
.grid{stroke:var(--grid)}.axis{stroke:var(--rule)}
.tick{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
.end{text-anchor:end}.middle,.node,.detail{text-anchor:middle}
.curve{fill:none;stroke-width:1.8;stroke-linejoin:round}.band{stroke:none;fill-opacity:.18}
.curve.s1{stroke:var(--s1)}.curve.s2{stroke:var(--s2)}.curve.s3{stroke:var(--s3)}.curve.s4{stroke:var(--s4)}
.band.s1,.dot.s1{fill:var(--s1)}.band.s2,.dot.s2{fill:var(--s2)}.band.s3,.dot.s3{fill:var(--s3)}
.band.s4,.dot.s4{fill:var(--s4)}
.swatch{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:7px;vertical-align:middle}
.swatch.s1{background:var(--s1)}.swatch.s2{background:var(--s2)}.swatch.s3{background:var(--s3)}
.swatch.s4{background:var(--s4)}
.legend{list-style:none;margin:6px 0 0;padding:0;font-size:.84rem;color:var(--soft);display:flex;flex-wrap:wrap;
gap:2px 18px}
.legend b{color:var(--ink);font-weight:600}
.edge{fill:none;stroke:var(--soft);stroke-opacity:.55;stroke-width:1.3}
.box{fill:var(--card);stroke:var(--rule);stroke-width:1.2}
.node{fill:var(--ink);font-size:13px;font-weight:600}.detail{fill:var(--soft);font-size:11.5px}
.sample{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:13px 15px;margin:0 0 14px}
.sample .who{font-size:.84rem;color:var(--soft);margin:10px 0 3px}.sample .who:first-child{margin-top:0}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.45}
.sample pre.answer{border-left:3px solid var(--s1);padding-left:11px}
details{margin:0 0 12px}summary{cursor:pointer;color:var(--soft);font-size:.92rem;margin-bottom:8px}
footer{margin-top:46px;padding-top:14px;padding-bottom:40px;border-top:1px solid var(--rule);font-size:.88rem;
color:var(--soft)}
@media(max-width:560px){.graph svg{width:500px}
body{font-size:15px}main,header,footer,nav{padding-left:14px;padding-right:14px}
.tiles{grid-template-columns:repeat(2,1fr)}.tile .value{font-size:1.3rem}
.tile .value .unit{display:block;line-height:1.3}h2{margin-top:34px}table.facts th{width:8.5rem}
table.lineage thead{display:none}table.lineage tr{display:grid;grid-template-columns:2rem 1fr;padding:8px 0;
border-bottom:1px solid var(--grid)}table.lineage td{display:block;border:0;padding:1px 0;grid-column:2}
table.lineage td.n{grid-column:1;grid-row:1;text-align:left;color:var(--soft)}
table.lineage td:nth-child(2){font-weight:600}
table.lineage td:nth-child(3)::before{content:"made from";color:var(--soft);font-size:.84rem}
table.lineage td:nth-child(4)::before{content:"made ";color:var(--soft);font-size:.84rem}}
@media print{figure,.tile,.sample{break-inside:avoid}nav{display:none}}
"""
