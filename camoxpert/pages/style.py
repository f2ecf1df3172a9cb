"""The look of the report: one style sheet, light and dark, wide and narrow."""

STYLE = """
:root { --ground:#f6f7f9; --card:#ffffff; --ink:#1f2933; --soft:#5c6875; --line:#dfe3e8;
  --accent:#2f6fdb; --good:#23864a; --warn:#a15c00; --warnground:#fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ground:#12161b; --card:#1a2027; --ink:#e4e9ef;
  --soft:#98a4b1; --line:#2c353f; --accent:#6ea8ff; --good:#56c282; --warn:#f0b45a;
  --warnground:#2e2513; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif; }
main { max-width:1120px; margin:0 auto; padding:28px 18px 60px; }
h1 { font-size:26px; margin:0 0 2px; overflow-wrap:anywhere; }
h2 { font-size:18px; margin:0 0 10px; }
h3 { font-size:15px; margin:16px 0 8px; color:var(--soft); font-weight:600; }
p { margin:6px 0; } .soft { color:var(--soft); }
section { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:18px 20px; margin:16px 0; overflow-x:auto; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px;
  margin:18px 0; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:12px 16px; }
.tile b { display:block; font-size:25px; line-height:1.25; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:13px; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th,td { text-align:right; padding:6px 8px; border-bottom:1px solid var(--line);
  white-space:nowrap; }
th:first-child,td:first-child { text-align:left; }
th { color:var(--soft); font-weight:600; font-size:13px; }
tr.floor td { color:var(--soft); font-style:italic; }
table.pairs { width:auto; } table.pairs td { text-align:left; white-space:normal;
  overflow-wrap:anywhere; }
tr.changed td { color:var(--accent); font-weight:600; }
img.chart { max-width:100%; height:auto; display:block; }
.gallery { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));
  gap:14px; }
figure { margin:0; } figure img { width:100%; height:auto; border-radius:8px; display:block; }
figcaption { font-size:13px; color:var(--soft); margin-top:4px; overflow-wrap:anywhere; }
.warning { background:var(--warnground); color:var(--warn); border-radius:8px; padding:8px 12px;
  margin:8px 0; }
.key i { display:inline-block; width:11px; height:11px; border-radius:3px; margin:0 5px 0 12px; }
pre { background:var(--ground); border:1px solid var(--line); border-radius:8px; padding:10px 12px;
  white-space:pre-wrap; overflow-wrap:anywhere; font-size:13px; margin:8px 0; }
summary { cursor:pointer; color:var(--accent); margin:8px 0; }
ul { margin:6px 0; padding-left:20px; }
@media (max-width:600px) { main { padding:16px 10px 40px; } section { padding:14px 12px; }
  th,td { padding:5px 7px; font-size:13px; } }
"""
