//! Reading cascades, sizes and settings from the command line.

use std::path::{Path, PathBuf};

use einfall_ir::array::element_count;
use einfall_ir::cascade::bind::{BindError, Bindings, Given, bind, check_facts};
use einfall_ir::cascade::{self, Cascade, Module, Size};
use einfall_ir::diag::{Diagnostic, render};
use einfall_ir::target::DataSheet;

use super::Failure;

/// Why a file cannot be read, and what to do about it.
pub fn unreadable(path: &Path, e: &std::io::Error) -> Failure {
    let name = path.display();
    Failure::Machine(match e.kind() {
        std::io::ErrorKind::NotFound if path.with_extension("ein").is_file() => {
            format!("{name}: there is no such file; there is {}", path.with_extension("ein").display())
        }
        std::io::ErrorKind::NotFound => {
            format!("{name}: there is no such file; give its path from the current folder, or an absolute one")
        }
        std::io::ErrorKind::IsADirectory => format!("{name}: this is a folder; give a file in it"),
        _ => format!("{name}: {e}"),
    })
}

/// A built-in data sheet by its name, or one from a `.toml` file such as `devices --probe` prints.
pub fn data_sheet(name: &str) -> Result<DataSheet, String> {
    if name.ends_with(".toml") {
        let text = std::fs::read_to_string(name).map_err(|e| format!("{name}: {e}"))?;
        return DataSheet::parse(&text).map_err(|e| format!("{name}: {e}"));
    }
    DataSheet::named(name).ok_or_else(|| {
        let names: Vec<String> = DataSheet::all().into_iter().map(|d| d.name).collect();
        format!("there is no target `{name}`; there are {}, and files (NAME.toml) of data sheets", names.join(", "))
    })
}

/// The ranks of cascades, for messages: `M, N`, or by cascade where they differ.
pub fn ranks_of<'a>(cascades: impl Iterator<Item = &'a Cascade>) -> String {
    let list = |c: &Cascade| c.ranks.iter().map(|(_, r)| r.name.clone()).collect::<Vec<_>>().join(", ");
    let all: Vec<(String, String)> = cascades.map(|c| (c.name.clone(), list(c))).collect();
    match all.as_slice() {
        [(_, ranks)] => format!("the ranks are {ranks}"),
        all => all.iter().map(|(name, ranks)| format!("{name} has {ranks}")).collect::<Vec<_>>().join("; "),
    }
}

/// A file of cascades with the name it is shown by.
pub struct Source {
    /// As given.
    pub name: String,
    /// Its text.
    pub text: String,
}

impl Source {
    /// Reads a file; `-` is standard input.
    pub fn read(path: &Path) -> Result<Source, Failure> {
        let name = path.display().to_string();
        let text = if name == "-" { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(path) };
        match text {
            Ok(text) => Ok(Source { name, text }),
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                Err(Failure::Wrong(format!("{name}: not UTF-8 text")))
            }
            Err(e) => Err(unreadable(path, &e)),
        }
    }

    /// Diagnostics with their places in this file.
    pub fn render(&self, diagnostics: &[Diagnostic]) -> String {
        render(diagnostics, &self.name, &self.text)
    }

    /// Its cascades; warnings go to standard error.
    pub fn module(&self) -> Result<Module, Failure> {
        let (module, diagnostics) = cascade::check(&self.text);
        match module {
            Some(module) => {
                if !diagnostics.is_empty() {
                    eprint!("{}", self.render(&diagnostics));
                }
                Ok(module)
            }
            None => Err(Failure::Wrong(self.render(&diagnostics))),
        }
    }

    /// The cascade called `name`, or the only one.
    pub fn cascade(&self, name: Option<&str>) -> Result<Cascade, Failure> {
        let mut all = self.module()?.cascades;
        let names = all.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
        match name {
            Some(name) => {
                let missing = format!("{}: no cascade `{name}`; it has {names}", self.name);
                all.into_iter().find(|c| c.name == name).ok_or(Failure::Usage(missing))
            }
            None if all.len() == 1 => Ok(all.remove(0)),
            None if all.is_empty() => Err(Failure::Wrong(format!("{}: no cascade in this file", self.name))),
            None => Err(Failure::Usage(format!("{}: choose one with --cascade: {names}", self.name))),
        }
    }

    /// A binding error; with its place where it is about a fact of the text.
    pub fn bind_failure(&self, e: &BindError) -> Failure {
        match e {
            BindError::Require { span, .. } => {
                let d = Diagnostic::error("E0800", *span, e.to_string())
                    .label("this fact does not hold")
                    .help("give sizes and parameters for which it holds");
                Failure::Wrong(self.render(&[d]))
            }
            BindError::Unbound { ranks } => {
                let list = ranks.iter().map(|r| format!("{r}=64")).collect::<Vec<_>>().join(",");
                let what = format!("no array fixes {}; give extents, e.g. --size {list}", ranks.join(", "));
                Failure::Usage(format!("{}: {what}", self.name))
            }
            _ => Failure::Wrong(format!("{}: {e}", self.name)),
        }
    }

    /// Refuses sizes whose arrays, in float64, are more than memory can be had for.
    pub fn room(&self, c: &Cascade, b: &Bindings) -> Result<(), Failure> {
        let size = |name: &str, dims: &[Size]| {
            let dims = b.sizes(c, name, dims).map_err(|e| self.bind_failure(&e))?;
            Ok(element_count(&dims).unwrap_or(u64::MAX))
        };
        let params = c.params.iter().map(|p| (&c.tensors[*p].name, &c.tensors[*p].dims));
        let mut n_elems = 0u64;
        for (name, dims) in params.chain(c.outputs.iter().map(|o| (&o.name, &o.dims))) {
            n_elems = n_elems.saturating_add(size(name, dims)?);
        }
        let fits = usize::try_from(n_elems).is_ok_and(|n| Vec::<f64>::new().try_reserve_exact(n).is_ok());
        let what =
            format!("{}: at these sizes the arrays hold {n_elems} elements, for which there is no memory", self.name);
        if fits { Ok(()) } else { Err(Failure::Machine(what)) }
    }
}

/// Every `.ein` file under the given paths, folders searched.
pub fn ein_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|e| unreadable(path, &e))?;
        let mut inside: Vec<PathBuf> = entries
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|x| x == "ein"))
            .collect();
        inside.sort();
        files.extend(inside);
    }
    if files.is_empty() {
        let folders: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
        return Err(Failure::Usage(format!(
            "no .ein file in {}: give files, or a folder that holds some",
            folders.join(", ")
        )));
    }
    Ok(files)
}

/// `NAME=VALUE` pairs separated by commas.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs<T>(pub Vec<(String, T)>);

impl<T: std::str::FromStr> std::str::FromStr for Pairs<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Pairs<T>, String> {
        let pair = |part: &str| {
            let (name, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is no NAME=VALUE"))?;
            let value = value.trim().parse().map_err(|_| format!("`{value}` in `{part}` is no number that fits"))?;
            Ok((name.trim().to_owned(), value))
        };
        text.split(',').filter(|p| !p.trim().is_empty()).map(pair).collect::<Result<_, String>>().map(Pairs)
    }
}

/// Extents from `--size` and `--static`, several options joined.
pub fn sizes(lists: &[Pairs<u64>]) -> Vec<(String, u64)> {
    lists.iter().flat_map(|p| p.0.iter().cloned()).collect()
}

/// Solves the ranks of `c` and checks its facts.
pub fn bindings(source: &Source, c: &Cascade, given: &Given) -> Result<Bindings, Failure> {
    let b = bind(c, given).map_err(|e| source.bind_failure(&e))?;
    check_facts(c, &b, &given.scalars).map_err(|e| source.bind_failure(&e))?;
    Ok(b)
}
