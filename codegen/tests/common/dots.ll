
define internal <16 x float> @emulated.dot.flush(<16 x float> %v) {
  %b = bitcast <16 x float> %v to <16 x i32>
  %e = and <16 x i32> %b, splat (i32 2139095040)
  %s = icmp eq <16 x i32> %e, zeroinitializer
  %z = select <16 x i1> %s, <16 x float> zeroinitializer, <16 x float> %v
  ret <16 x float> %z
}

define internal <16 x float> @emulated.dot.add(<16 x float> %acc, <16 x i32> %x, <16 x i32> %y) {
  %xf = bitcast <16 x i32> %x to <16 x float>
  %yf = bitcast <16 x i32> %y to <16 x float>
  %a = call <16 x float> @emulated.dot.flush(<16 x float> %xf)
  %b = call <16 x float> @emulated.dot.flush(<16 x float> %yf)
  %p = fmul <16 x float> %a, %b
  %s = fadd <16 x float> %acc, %p
  %z = call <16 x float> @emulated.dot.flush(<16 x float> %s)
  ret <16 x float> %z
}

define internal <16 x float> @emulated.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b) {
  %x = bitcast <32 x bfloat> %a to <16 x i32>
  %y = bitcast <32 x bfloat> %b to <16 x i32>
  %xh = and <16 x i32> %x, splat (i32 -65536)
  %yh = and <16 x i32> %y, splat (i32 -65536)
  %first = call <16 x float> @emulated.dot.add(<16 x float> %acc, <16 x i32> %xh, <16 x i32> %yh)
  %xl = shl <16 x i32> %x, splat (i32 16)
  %yl = shl <16 x i32> %y, splat (i32 16)
  %second = call <16 x float> @emulated.dot.add(<16 x float> %first, <16 x i32> %xl, <16 x i32> %yl)
  ret <16 x float> %second
}
