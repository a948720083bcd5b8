"""The page's style sheet: light and dark, no outside resource."""

from __future__ import annotations

STYLE = """
:root{--paper:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#5a6272;--line:#e1e4ea;--grid:#e8eaef;
--accent:#2f62c4;--ghost:#dbe4f6;--same:#c3c9d4;--good:#1c7a58;--bad:#b53546;--grown:#b85f0e;--limit:#b53546;
--embedding:#2f62c4;--attention:#b4560f;--mlp:#1c7a58;--norm:#93407f;--head:#b53546;--other:#66707f}
@media (prefers-color-scheme:dark){:root{--paper:#101319;--card:#181c24;--ink:#e8eaf0;--soft:#9aa3b5;--line:#2a303c;
--grid:#262c37;--accent:#7aa2f7;--ghost:#263250;--same:#4a5263;--good:#4cbb8a;--bad:#f0727f;--grown:#eb9a4b;
--limit:#f0727f;--embedding:#3a6fd8;--attention:#bd6018;--mlp:#218c66;--norm:#a34d8f;--head:#c24052;--other:#6b7686}}
*{box-sizing:border-box}
html{color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1060px;margin:0 auto;padding:32px 20px 56px}
header p{margin:2px 0 0;color:var(--soft)}
h1{font-size:28px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:0 0 4px}
h3{font-size:15px;margin:8px 0 2px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px;margin-top:18px}
.note{color:var(--soft);margin:0 0 14px}
.tags{display:flex;flex-wrap:wrap;gap:6px;margin-top:12px}
.tags span{border:1px solid var(--line);background:var(--card);border-radius:99px;padding:2px 11px;font-size:13px}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin-top:18px}
.card{flex:1 1 clamp(140px,22%,210px);min-width:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.card b{display:block;font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.card span{color:var(--soft);font-size:13px}
.alert{border-left:4px solid var(--bad)}
.hint{border-left:4px solid var(--accent)}
.alert ul,.hint ul{margin:6px 0 0;padding-left:20px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:10px 36px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{color:var(--soft);font-weight:600;text-align:left;white-space:nowrap}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
td{overflow-wrap:break-word;max-width:52ch}
tr:last-child td{border-bottom:0}
.right{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th:last-child,td:last-child{padding-right:0}
code,.mono{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{margin-top:14px}
summary{cursor:pointer;color:var(--accent);font-size:14px}
summary:focus-visible{outline:2px solid var(--accent);outline-offset:3px;border-radius:4px}
details>*:not(summary){margin-top:10px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:12px 0 4px;font-size:13px;color:var(--soft)}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.picture{width:100%;height:auto;display:block}
.picture text{font-size:13px;fill:var(--ink);font-family:inherit}
.picture .number{font-variant-numeric:tabular-nums;font-size:12.5px}
.picture .faint,.picture text.faint{fill:var(--soft);font-size:12.5px}
.picture .end{text-anchor:end}.picture .middle{text-anchor:middle}
.picture .on{fill:#fff;font-size:12.5px;font-weight:600;pointer-events:none}
.picture .on.dim{font-weight:400;opacity:.9}
.bar.start{fill:var(--accent)}.bar.after{fill:var(--accent)}.bar.ghost{fill:var(--ghost)}
.bar.same{fill:var(--same)}.bar.grown{fill:var(--grown)}.bar.good{fill:var(--good)}.bar.bad{fill:var(--bad)}
.rule{stroke:var(--line);stroke-width:1}.grid{stroke:var(--grid);stroke-width:1}
.limit{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:5 4}
.tile{fill:var(--paper);stroke:var(--line)}
.mask.full{fill:var(--embedding)}.mask.window{fill:var(--attention)}.softcap{fill:var(--norm);stroke:var(--card);stroke-width:1.5}
.curve{stroke-width:2.5;fill:none;stroke-linecap:round}
.curve.c0{stroke:var(--mlp)}.curve.c1{stroke:var(--embedding)}.curve.c2{stroke:var(--attention)}
.dot.c0{fill:var(--mlp)}.dot.c1{fill:var(--embedding)}.dot.c2{fill:var(--attention)}
.part.embedding{fill:var(--embedding)}.part.attention{fill:var(--attention)}.part.mlp{fill:var(--mlp)}
.part.norm{fill:var(--norm)}.part.head{fill:var(--head)}.part.other{fill:var(--other)}
.swatch-embedding,.swatch-full{background:var(--embedding)}.swatch-attention,.swatch-window{background:var(--attention)}
.swatch-mlp{background:var(--mlp)}.swatch-norm,.swatch-softcap{background:var(--norm)}.swatch-head{background:var(--head)}
.swatch-other{background:var(--other)}.swatch-after{background:var(--accent)}.swatch-ghost{background:var(--ghost)}
.swatch-same{background:var(--same)}.swatch-grown{background:var(--grown)}
.bar.compute{fill:var(--accent)}.bar.prepost{fill:var(--attention)}.bar.system{fill:var(--same)}
.swatch-compute{background:var(--accent)}.swatch-prepost{background:var(--attention)}.swatch-system{background:var(--same)}
.point{fill:var(--accent);stroke:var(--card);stroke-width:1.5}.point.base{fill:var(--card);stroke:var(--accent);stroke-width:2.5}
.whisker{stroke:var(--accent);stroke-width:1.5;opacity:.65}
.heat{fill:var(--attention)}.cell{fill:var(--paper)}.kept{fill:var(--embedding);stroke:var(--card);stroke-width:1}
.swatch-heat{background:var(--attention)}.swatch-kept{background:var(--embedding)}.swatch-point{background:var(--accent)}
.swatch-ghost{background:var(--ghost)}
.scroll+h3{margin-top:20px}.scroll+.scroll{margin-top:14px}
.formula{margin:0;padding-left:20px}.formula li{margin:4px 0}
footer{color:var(--soft);font-size:13px;margin-top:22px}
@media (max-width:600px){main{padding:20px 12px}section{padding:16px 14px}.card b{font-size:20px}}
@media print{section,.card{break-inside:avoid}body{background:#fff}}
"""

__all__ = ["STYLE"]
