//! How much memory this process may use.

use std::fs;

/// Used when neither the kernel nor the container tells.
const FALLBACK_BYTES: u64 = 4 << 30;

/// The container's memory limit or the machine's memory, whichever is less.
#[must_use]
pub(super) fn limit_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| total_of(&text));
    let cgroup = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    let container = cgroup
        .iter()
        .find_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    machine
        .into_iter()
        .chain(container)
        .min()
        .unwrap_or(FALLBACK_BYTES)
}

/// Bytes of the `MemTotal` line.
fn total_of(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn reads_the_total() {
        let text = "MemFree:  12 kB\nMemTotal:       24610000 kB\nBuffers: 3 kB\n";
        assert_eq!(super::total_of(text), Some(24_610_000 * 1024));
        assert_eq!(super::total_of("MemFree: 1 kB"), None);
        assert!(super::limit_bytes() > 0);
    }
}
