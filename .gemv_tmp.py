import sys, time, torch, numpy as np
sys.path.insert(0,'/work/main/benchmarks/kernels')
import linear as L
from glmlocal import kernels
from glmlocal.kernels.cpu import _cpu
kernels.set_num_threads(int(sys.argv[1]))
m = L.random_matrix("Q4_0", 1408, 4096, 0)
from glmlocal.kernels.cpu.packing import duplicate
first = kernels.pack(m)
ws=[first]+[duplicate(first) for _ in range(int(sys.argv[2]))]
for line in open('/proc/self/smaps_rollup'):
    if 'AnonHuge' in line or line.startswith('Rss'): print(line.strip())
for isa in sys.argv[3].split(','):
  _cpu.set_isa(isa)
  for M in (8,16,32,64,192):
    x=torch.randn(M,4096)
    ts=[]
    for w in ws:
        t=time.perf_counter(); kernels.linear(x,w); ts.append(time.perf_counter()-t)
    t=np.median(ts[3:]); print(isa,M,f"{t*1e6:.0f} us {first.nbytes/t/1e9:.1f} GB/s {2*M*1408*4096/t/1e9:.0f} GOP/s")
print("bw", _cpu.read_bandwidth(256<<20), _cpu.read_bandwidth(1<<30))
