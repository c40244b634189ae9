//! The families of contraction instructions that mappings are made of, as the model sees them.
//!
//! Invariant: shapes and types are those of `einfall_ir::kernel::atoms`; which family a device has follows from its sheet
//! alone, the fastest first.

use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Engine, Scope};
use einfall_ir::target::DataSheet;

use super::facts::{Unsupported, unsupported};

/// A family of instructions with what feeds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// What its atoms' names begin with.
    pub name: &'static str,
    /// The unit that issues one.
    pub scope: Scope,
    /// Rows of an instruction; those after the first read their left operand from registers only.
    pub rows: &'static [i64],
    /// Most columns of an instruction; it has every multiple of 8 up to them.
    pub columns: i64,
    /// What fills shared memory.
    pub engine: Engine,
    /// Most units of the consumers.
    pub units: i64,
    /// Most rows of a unit that are worth their registers.
    pub unit_rows: i64,
    /// Registers per thread beside fragments, operands and what every kernel needs: addresses of the threads' own copies
    /// and of what `ldmatrix` reads.
    pub addresses: i64,
    /// Most tasks a multiprocessor runs at a time that parts of streams are counted for.
    pub resident: i64,
}

/// Summed coordinates of an instruction with 16-bit operands.
pub const DEPTH: i64 = 16;

impl Family {
    /// Warpgroups' asynchronous instructions, fed by TMA (compute capability 9.0).
    pub const WGMMA: Family = Family {
        name: "wgmma",
        scope: Scope::Warpgroup,
        rows: &[64, 32],
        columns: 256,
        engine: Engine::Tma,
        units: 4,
        unit_rows: 128,
        addresses: 0,
        resident: 2,
    };

    /// Warps' synchronous instructions, fed by the threads' own copies (compute capability 8.0 and later).
    pub const MMA: Family = Family {
        name: "mma",
        scope: Scope::Warp,
        rows: &[16],
        columns: 8,
        engine: Engine::CpAsync,
        units: 8,
        unit_rows: 64,
        addresses: 32,
        resident: 8,
    };

    /// Multiply-adds of what each thread holds, fed from shared memory: no instruction for tiles, mapped by
    /// [`super::multiply_add`]'s rule.
    pub const FMA: Family = Family {
        name: "fma",
        scope: Scope::Warp,
        rows: &[32, 16, 8, 4],
        columns: 64,
        engine: Engine::CpAsync,
        units: 4,
        unit_rows: 32,
        addresses: 32,
        resident: 4,
    };

    /// Whether an instruction multiplies elements of these types: two of 16 bits, or whatever threads widen to f32.
    pub fn takes(&self, x: DType, y: DType) -> bool {
        match self.name {
            "fma" => [x, y].iter().all(|d| d.is_float() && d.bits() <= 32),
            _ => x == y && matches!(x, DType::BF16 | DType::F16),
        }
    }

    /// The family of a device.
    ///
    /// # Errors
    /// Which instructions and copies it would need.
    pub fn of(sheet: &DataSheet) -> Result<Family, Unsupported> {
        let Some(gpu) = &sheet.gpu else {
            return unsupported("device", format!("{} is not a GPU", sheet.name));
        };
        let has = |list: &[String], name: &str| list.iter().any(|x| x == name);
        let fed = |f: &Family, engine| has(&gpu.atoms, f.name) && has(&gpu.copy_engines, engine);
        if fed(&Family::WGMMA, "tma") {
            return Ok(Family::WGMMA);
        }
        if fed(&Family::MMA, "cp_async") {
            return Ok(Family::MMA);
        }
        let needs = "has neither wgmma fed by TMA nor mma fed by cp_async, which contractions are mapped to";
        unsupported("atoms", format!("{} {needs}", sheet.name))
    }

    /// Whether instructions complete after they are issued, and a warp of its own may issue copies for them.
    pub fn asynchronous(&self) -> bool {
        self.engine == Engine::Tma
    }

    /// Threads of a unit.
    pub fn threads(&self) -> i64 {
        self.scope.threads() as i64
    }

    /// The name of an instruction.
    pub fn atom(&self, rows: i64, columns: i64, operand: DType) -> String {
        format!("{}.m{rows}n{columns}k{DEPTH}.{operand}", self.name)
    }

    /// Rows and columns of an instruction of this family, by its name.
    pub fn shape(&self, atom: &str) -> Option<(i64, i64)> {
        let (rows, rest) = atom.strip_prefix(self.name)?.strip_prefix(".m")?.split_once('n')?;
        Some((rows.parse().ok()?, rest.split_once('k')?.0.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use einfall_ir::kernel::atoms;

    use super::*;

    #[test]
    fn instructions_are_those_of_the_table() {
        for family in [Family::WGMMA, Family::MMA] {
            let mine = |name: &str| {
                let here = family.shape(name)?;
                // Other types have other depths.
                (family.atom(here.0, here.1, DType::BF16) == name).then_some(here)
            };
            let mut listed: Vec<(i64, i64)> = atoms::all().filter_map(|a| mine(&a.name.0)).collect();
            let mut shapes: Vec<(i64, i64)> =
                family.rows.iter().flat_map(|r| (8..=family.columns).step_by(8).map(move |c| (*r, c))).collect();
            listed.sort_unstable();
            shapes.sort_unstable();
            assert_eq!(listed, shapes);
            for a in atoms::all().filter(|a| mine(&a.name.0).is_some()) {
                assert_eq!((a.scope, a.asynchronous), (family.scope, family.asynchronous()));
                assert_eq!(a.shape[2] as i64, DEPTH);
                assert_eq!(a.registers_each() as i64, family.rows[0] / a.shape[0] as i64);
                assert!(a.a_memory == (a.shape[0] as i64 == family.rows[0]) || !family.asynchronous());
            }
        }
    }

    #[test]
    fn devices_have_their_fastest_family() {
        let of = |name: &str| DataSheet::named(name).map(|s| Family::of(&s).map(|f| f.name).map_err(|e| e.constraint));
        for (name, family) in
            [("h100", "wgmma"), ("h200", "wgmma"), ("a100", "mma"), ("rtx4090", "mma"), ("b200", "mma")]
        {
            assert_eq!(of(name), Some(Ok(family)), "{name}");
        }
        assert_eq!(of("cpu"), Some(Err("device".to_owned())));
        assert_eq!(of("webgpu"), Some(Err("atoms".to_owned())));
    }
}
