import sys,time
src=open("/tmp/w/probe/zoo.py").read().replace("T=time.process_time()","""T=time.process_time()
import collections
tot=collections.Counter()
depth=[]
def timed(mod,name):
    f=getattr(mod,name)
    def g(*a,**k):
        t=time.process_time(); depth.append(0)
        try: return f(*a,**k)
        finally:
            d=time.process_time()-t; inner=depth.pop(); tot[name]+=d-inner
            if depth: depth[-1]+=d
    setattr(mod,name,g)
for n in ("trace","fuse_layers","_run","_close","_plain_copy","_calibrate","measure","_writes","_choose","link"): timed(A,n)
timed(FusedLayer,"make_sparse")
import copy as cc
timed(A.copy,"deepcopy")
""",1).replace("print(time.process_time()-T)","print(time.process_time()-T, tot)")
exec(compile(src,"z","exec"))
