
@emulated.tiles = internal global [8 x [16 x [16 x i32]]] zeroinitializer

define internal void @emulated.tilerelease() {
  store [8 x [16 x [16 x i32]]] zeroinitializer, ptr @emulated.tiles
  ret void
}

define internal void @emulated.tilezero(i8 %t) {
  %tile = getelementptr [8 x [16 x [16 x i32]]], ptr @emulated.tiles, i64 0, i8 %t
  store [16 x [16 x i32]] zeroinitializer, ptr %tile
  ret void
}

define internal void @emulated.tileloadd64(i8 %t, ptr %from, i64 %stride) {
entry:
  br label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r1, %row ]
  %o = mul i64 %r, %stride
  %p = getelementptr i8, ptr %from, i64 %o
  %v = load <16 x i32>, ptr %p, align 1
  %q = getelementptr [8 x [16 x [16 x i32]]], ptr @emulated.tiles, i64 0, i8 %t, i64 %r
  store <16 x i32> %v, ptr %q, align 4
  %r1 = add i64 %r, 1
  %more = icmp slt i64 %r1, 16
  br i1 %more, label %row, label %done
done:
  ret void
}

define internal void @emulated.tilestored64(i8 %t, ptr %to, i64 %stride) {
entry:
  br label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r1, %row ]
  %o = mul i64 %r, %stride
  %p = getelementptr i8, ptr %to, i64 %o
  %q = getelementptr [8 x [16 x [16 x i32]]], ptr @emulated.tiles, i64 0, i8 %t, i64 %r
  %v = load <16 x i32>, ptr %q, align 4
  store <16 x i32> %v, ptr %p, align 1
  %r1 = add i64 %r, 1
  %more = icmp slt i64 %r1, 16
  br i1 %more, label %row, label %done
done:
  ret void
}

define internal <16 x float> @emulated.flush(<16 x float> %v) {
  %b = bitcast <16 x float> %v to <16 x i32>
  %e = and <16 x i32> %b, splat (i32 2139095040)
  %s = icmp eq <16 x i32> %e, zeroinitializer
  %z = select <16 x i1> %s, <16 x float> zeroinitializer, <16 x float> %v
  ret <16 x float> %z
}

define internal void @emulated.tdpbf16ps(i8 %d, i8 %a, i8 %b) {
entry:
  br label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r1, %next ]
  %pd = getelementptr [8 x [16 x [16 x i32]]], ptr @emulated.tiles, i64 0, i8 %d, i64 %r
  %d0 = load <16 x float>, ptr %pd, align 4
  br label %step
step:
  %k = phi i64 [ 0, %row ], [ %k1, %step ]
  %acc = phi <16 x float> [ %d0, %row ], [ %acc2, %step ]
  %pa = getelementptr [8 x [16 x [16 x i32]]], ptr @emulated.tiles, i64 0, i8 %a, i64 %r, i64 %k
  %x = load i32, ptr %pa, align 4
  %pb = getelementptr [8 x [16 x [16 x i32]]], ptr @emulated.tiles, i64 0, i8 %b, i64 %k
  %y = load <16 x i32>, ptr %pb, align 4
  %xl = shl i32 %x, 16
  %xh = and i32 %x, -65536
  %xlf = bitcast i32 %xl to float
  %xhf = bitcast i32 %xh to float
  %xl0 = insertelement <16 x float> poison, float %xlf, i64 0
  %xlv = shufflevector <16 x float> %xl0, <16 x float> poison, <16 x i32> zeroinitializer
  %xh0 = insertelement <16 x float> poison, float %xhf, i64 0
  %xhv = shufflevector <16 x float> %xh0, <16 x float> poison, <16 x i32> zeroinitializer
  %yl = shl <16 x i32> %y, splat (i32 16)
  %yh = and <16 x i32> %y, splat (i32 -65536)
  %ylf = bitcast <16 x i32> %yl to <16 x float>
  %yhf = bitcast <16 x i32> %yh to <16 x float>
  %fa = call <16 x float> @emulated.flush(<16 x float> %xlv)
  %fb = call <16 x float> @emulated.flush(<16 x float> %xhv)
  %ga = call <16 x float> @emulated.flush(<16 x float> %ylf)
  %gb = call <16 x float> @emulated.flush(<16 x float> %yhf)
  %p1 = fmul <16 x float> %fa, %ga
  %s1 = fadd <16 x float> %acc, %p1
  %p2 = fmul <16 x float> %fb, %gb
  %s2 = fadd <16 x float> %s1, %p2
  %acc2 = call <16 x float> @emulated.flush(<16 x float> %s2)
  %k1 = add i64 %k, 1
  %morek = icmp slt i64 %k1, 16
  br i1 %morek, label %step, label %next
next:
  store <16 x float> %acc2, ptr %pd, align 4
  %r1 = add i64 %r, 1
  %more = icmp slt i64 %r1, 16
  br i1 %more, label %row, label %done
done:
  ret void
}
