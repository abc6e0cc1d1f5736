"""What the journal says, for people."""
from __future__ import annotations
def summary(r):
    if "outcome" in r: return f"{r['outcome']} {r.get('class')} {r.get('message','')[:100]}"
    return ", ".join(f"{w}: {x['outcome']}" + (f" ({x['class']}: {x['message'][:120]})" if x['outcome']!='ok' else f" {x.get('seconds')}") for w,x in r["ways"].items()) + f" plain {r.get('plain',{}).get('seconds')} all {r.get('seconds')}"
def page(r): return ""
def causes(r): return ""
