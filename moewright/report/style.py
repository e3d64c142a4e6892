"""The style sheet of the report: light and dark, wide and narrow."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2128; --soft: #57606a; --edge: #d8dee4; --accent: #0b5cad;
  --tint: #eaf3fc;
  --s0: #0b62c4; --s1: #b45309; --s2: #15803d; --s3: #7e22ce;
  --h-4: #08519c; --h-3: #3182bd; --h-2: #6baed6; --h-1: #bdd7ea; --h0: #e9eaec;
  --h1: #fdd0a2; --h2: #fd9a4a; --h3: #e6550d; --h4: #a63603;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --card: #161b22; --text: #e6edf3; --soft: #a3adb8; --edge: #343c46; --accent: #79b8ff;
    --tint: #1a2a3d;
    --s0: #79b8ff; --s1: #ffb35c; --s2: #63d483; --s3: #d5aaff;
    --h-4: #a6d3ff; --h-3: #5fa8ee; --h-2: #3277b8; --h-1: #284a6a; --h0: #363c45;
    --h1: #6b4524; --h2: #b0621b; --h3: #f08a32; --h4: #ffd0a0;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 32px 16px 64px; }
header p { color: var(--soft); font-size: 1.05rem; }
h1 { margin: 0 0 8px; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 12px; font-size: 1.2rem; }
p { margin: 0 0 12px; max-width: 70ch; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 20px;
  margin-top: 20px; }
section > :last-child { margin-bottom: 0; }
figure { margin: 20px 0; }
figcaption { color: var(--soft); font-size: 0.9rem; padding: 0 0 8px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 0 32px; margin: 0 0 16px; }
dl div { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; padding: 6px 0;
  border-bottom: 1px solid var(--edge); }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; border-bottom: 1px solid var(--edge); text-align: left; vertical-align: bottom; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--card); min-width: 130px; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
tr.best > * { background: var(--tint); font-weight: 600; }
pre { margin: 0; padding: 16px; background: var(--page); border: 1px solid var(--edge); border-radius: 8px;
  font: 0.87rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--accent); font-weight: 400; }
.chart { display: block; max-width: 100%; height: auto; }
.chart.narrow { display: none; }
@media (max-width: 640px) {
  main { padding: 20px 8px 40px; }
  section { padding: 14px 12px; }
  h1 { font-size: 1.5rem; }
  .chart.wide { display: none; }
  .chart.narrow { display: block; }
}
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg text.tick { fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--edge); }
.axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.s0, .mark.s0 { stroke: var(--s0); }
.line.s1, .mark.s1 { stroke: var(--s1); }
.line.s2, .mark.s2 { stroke: var(--s2); }
.line.s3, .mark.s3 { stroke: var(--s3); }
.line.s1 { stroke-dasharray: 7 4; }
.line.s2 { stroke-dasharray: 2 4; }
.line.s3 { stroke-dasharray: 10 4 2 4; }
.mark { fill: var(--card); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 0 0 10px; padding: 0;
  font-size: 0.88rem; }
.legend li { display: flex; align-items: center; gap: 6px; }
.legend .swatch { flex: none; }
.scale { display: block; max-width: 100%; margin: 0 0 12px; }
.cell.h-4 { fill: var(--h-4); } .cell.h-3 { fill: var(--h-3); } .cell.h-2 { fill: var(--h-2); }
.cell.h-1 { fill: var(--h-1); } .cell.h0 { fill: var(--h0); } .cell.h1 { fill: var(--h1); }
.cell.h2 { fill: var(--h2); } .cell.h3 { fill: var(--h3); } .cell.h4 { fill: var(--h4); }
.cell.empty { fill: none; stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 2; }
@media print { section { break-inside: avoid; } }
"""
