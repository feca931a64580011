import sys; sys.argv=["zoo.py","mobileone_s0-pooled"]
import cProfile,pstats
p=cProfile.Profile()
try: p.runcall(exec,compile(open("/tmp/w/probe/zoo.py").read(),"z","exec"),{"__name__":"z"})
except SystemExit: pass
st=pstats.Stats(p); st.sort_stats("cumtime").print_stats(70)
