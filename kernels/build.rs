//! With the feature `cuda`: every `cuda/*.cu` becomes one fatbin in `OUT_DIR`, with machine code for each architecture and
//! PTX for later ones. Nothing links CUDA: the driver loads the fatbins at run time.
//!
//! `NVCC` or `CUDA_HOME` says where the compiler is (13.0 or later; `e2e/cuda.sh` fetches one from the Python package
//! index); `KERNEL_ARCHS` (such as `90`, or `80,90`) builds fewer architectures, for quick builds, and `none` no kernels at
//! all, for the tests of how they are planned and launched, which need neither nvcc nor a GPU.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Architectures with machine code in a release; the last one also as PTX.
const ARCHS: &str = "80,89,90,100,120";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["NVCC", "CUDA_HOME", "KERNEL_ARCHS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=cuda");
    let archs = env::var("KERNEL_ARCHS").unwrap_or_else(|_| ARCHS.to_owned());
    let nvcc = (archs.trim() != "none").then(nvcc);
    let archs: Vec<&str> = archs.split(',').map(str::trim).collect();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut files: Vec<PathBuf> = fs::read_dir("cuda")
        .expect("kernels/cuda exists")
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect();
    files.sort();
    let (headers, sources): (Vec<PathBuf>, Vec<PathBuf>) = files
        .into_iter()
        .partition(|path| path.extension().is_some_and(|extension| extension == "cuh"));
    let sources: Vec<PathBuf> = sources
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    let headers: Vec<u8> = headers.iter().flat_map(|path| read(path)).collect();
    thread::scope(|scope| {
        for source in &sources {
            let (nvcc, archs, out, headers) = (&nvcc, &archs, &out, &headers);
            scope.spawn(move || {
                // What a file was compiled from stands beside its result: the others need not be compiled again.
                let name = source.file_name().expect("a file has a name");
                let stamp = out.join(name).with_extension("stamp");
                let made_of = [
                    format!("{nvcc:?}\n{}\n", archs.join(",")).as_bytes(),
                    include_bytes!("build.rs"),
                    headers,
                    &read(source),
                ]
                .concat();
                let fatbin = out.join(name).with_extension("fatbin");
                if !fatbin.is_file() || fs::read(&stamp).ok().as_ref() != Some(&made_of) {
                    match nvcc {
                        Some(nvcc) => compile(nvcc, source, archs, out),
                        None => fs::write(fatbin, []).expect("OUT_DIR can be written"),
                    }
                    fs::write(&stamp, made_of).expect("OUT_DIR can be written");
                }
            });
        }
    });
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let folders = env::var_os("CUDA_HOME")
        .into_iter()
        .chain([Path::new("/usr/local/cuda").into()]);
    folders
        .map(|folder| Path::new(&folder).join("bin/nvcc"))
        .find(|nvcc| nvcc.is_file())
        .unwrap_or_else(|| {
            panic!(
                "the feature `cuda` compiles GPU kernels and needs nvcc 13.0 or later: set CUDA_HOME or NVCC, \
                 install the CUDA toolkit, or run `. e2e/cuda.sh`, which fetches the compiler"
            )
        })
}

fn compile(nvcc: &Path, source: &Path, archs: &[&str], out: &Path) {
    let name = source
        .file_stem()
        .and_then(|stem| stem.to_str())
        .expect("kernel files have plain names");
    let mut command = Command::new(nvcc);
    command.args([
        "-O3",
        "-std=c++17",
        "-lineinfo",
        "-fatbin",
        "-Xfatbin=-compress-all",
        "-o",
    ]);
    command.arg(out.join(format!("{name}.fatbin"))).arg(source);
    // Files of one architecture use instructions that no other has.
    if name.ends_with("_sm90a") {
        command.arg("-gencode=arch=compute_90a,code=sm_90a");
    } else {
        for arch in archs {
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        let last = archs.last().expect("KERNEL_ARCHS names an architecture");
        command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    }
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {}: {error}", nvcc.display()));
    assert!(
        output.status.success(),
        "{} does not compile:\n{}{}",
        source.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    // Products that wait for each other are right and slow: nothing else would tell.
    let said = String::from_utf8_lossy(&output.stderr);
    if let Some(line) = said.lines().find(|line| line.contains("are serialized")) {
        println!("cargo:warning={}: {line}", source.display());
    }
}
