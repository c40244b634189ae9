//! Memory, tensor copies, mbarriers and wgmma of the machine.

use half::{bf16, f16};

use super::{Machine, Mbarrier};

fn swizzled(address: u64, span: u64) -> u64 {
    match span {
        128 => address ^ ((address >> 3) & 0x70),
        64 => address ^ ((address >> 3) & 0x30),
        32 => address ^ ((address >> 3) & 0x10),
        _ => address,
    }
}

impl Machine<'_> {
    pub fn read(memory: &[u8], at: u64, bytes: usize) -> u64 {
        let slice = memory.get(at as usize..at as usize + bytes).unwrap_or_else(|| panic!("reads {bytes} at {at:#x}"));
        assert!(at.is_multiple_of(bytes as u64), "unaligned read of {bytes} at {at:#x}");
        slice.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
    }

    pub fn write(memory: &mut [u8], at: u64, bytes: usize, v: u64) {
        assert!(at.is_multiple_of(bytes as u64), "unaligned write of {bytes} at {at:#x}");
        for i in 0..bytes {
            *memory.get_mut(at as usize + i).unwrap_or_else(|| panic!("writes at {at:#x}")) = (v >> (8 * i)) as u8;
        }
    }

    pub fn arrive(&mut self, cta: usize, at: u64, arrivals: i64, tx: i64) {
        let b = self.mbarriers.get_mut(&(cta, at)).unwrap_or_else(|| panic!("no mbarrier at {at:#x}"));
        b.tx += tx;
        b.pending -= arrivals;
        assert!(b.pending >= 0, "more arrivals at {at:#x} than its phase counts");
        if b.pending == 0 && b.tx == 0 {
            *b = Mbarrier { pending: b.count, phase: b.phase + 1, ..*b };
        }
    }

    /// A tensor copy between the box at `coords` and shared memory of `ctas`.
    pub fn tensor(&mut self, map: usize, coords: &[i32], ctas: &[usize], at: u64, load: bool) -> i64 {
        let m = &self.maps[map];
        assert!(at.is_multiple_of(128), "a box at {at:#x}");
        let count: u64 = m.boxed.iter().product();
        for i in 0..count {
            let (mut rest, mut address, mut inside) = (i, m.base as i64, true);
            for (d, &c) in coords.iter().enumerate() {
                let x = i64::from(c) + (rest % m.boxed[d]) as i64;
                rest /= m.boxed[d];
                inside &= (0..m.extents[d] as i64).contains(&x);
                address += x * m.strides[d] as i64;
            }
            let place = swizzled(at + i * m.bytes, m.swizzle);
            let bytes = m.bytes as usize;
            if load {
                let v = if inside { Machine::read(self.global, address as u64, bytes) } else { 0 };
                for &c in ctas {
                    Machine::write(&mut self.shared[c], place, bytes, v);
                }
            } else if inside {
                let v = Machine::read(&self.shared[ctas[0]], place, bytes);
                Machine::write(self.global, address as u64, bytes, v);
            }
        }
        (count * m.bytes) as i64
    }

    /// Element (mn, k) of an operand in shared memory.
    pub fn described(&self, cta: usize, desc: u64, transposed: bool, mn: u64, k: u64, kind: &str) -> f32 {
        let es: u64 = if kind == "tf32" { 4 } else { 2 };
        let (start, lbo, sbo) = ((desc & 0x3fff) << 4, (desc >> 16 & 0x3fff) << 4, (desc >> 32 & 0x3fff) << 4);
        let span = [16, 128, 64, 32][(desc >> 62) as usize];
        let (inner, outer) = if transposed { (mn * es, k) } else { (k * es, mn) };
        let linear = start + inner % span + inner / span * lbo + outer % 8 * span + outer / 8 * sbo;
        let at = swizzled(linear, if span == 16 { 0 } else { span });
        decoded(Machine::read(&self.shared[cta], at, es as usize), kind)
    }
}

/// The float of these bits.
pub fn decoded(bits: u64, kind: &str) -> f32 {
    match kind {
        "bf16" => bf16::from_bits(bits as u16).to_f32(),
        "f16" => f16::from_bits(bits as u16).to_f32(),
        _ => f32::from_bits(bits as u32),
    }
}
