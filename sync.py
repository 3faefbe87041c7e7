# copies the host parts from .cpp to .cu
import sys
R = '// ' + '=' * 116
root = sys.argv[1] if len(sys.argv) > 1 else '/work/main'
cpp = open(root + '/train_gpt2_compact.cpp').read(); cu = open(root + '/train_gpt2_compact.cu').read()
def cut(s, a, b):
    i = s.index(R + '\n' + a); j = s.index(R + '\n' + b) if b else len(s)
    return i, j
i, j = cut(cpp, '// host, first part', '// layers: forward'); k, l = cut(cu, '// host, first part', '// device: errors')
cu = cu[:k] + cpp[i:j] + cu[l:]
i, j = cut(cpp, '// host, second part', None); k, l = cut(cu, '// host, second part', None)
cu = cu[:k] + cpp[i:]
open(root + '/train_gpt2_compact.cu', 'w').write(cu)
