//! `process_*`: memory, processor time, open files, start, from `/proc`.

use prometheus::{Counter, Gauge, Registry};

/// Ticks per second of `/proc/self/stat`: fixed by Linux's user interface on every architecture we run on.
const TICKS_PER_SECOND: f64 = 100.0;
const PAGE_BYTES: f64 = 4096.0;

pub(super) struct Process {
    resident_memory: Gauge,
    virtual_memory: Gauge,
    open_files: Gauge,
    cpu_seconds: Counter,
}

impl Process {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let cpu_seconds = Counter::new("process_cpu_seconds_total", "Processor time used")?;
        registry.register(Box::new(cpu_seconds.clone()))?;
        let start = gauge("process_start_time_seconds", "Start, in seconds since 1970")?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        start.set(now.map_or(0.0, |now| now.as_secs_f64()));
        Ok(Self {
            resident_memory: gauge("process_resident_memory_bytes", "Memory in RAM")?,
            virtual_memory: gauge("process_virtual_memory_bytes", "Memory mapped")?,
            open_files: gauge("process_open_fds", "Open files and sockets")?,
            cpu_seconds,
        })
    }

    /// Takes the current values; where there is no `/proc`, they stay.
    pub(super) fn read(&self) {
        let number = |text: Option<&str>| text.and_then(|text| text.parse::<f64>().ok());
        if let Ok(statm) = std::fs::read_to_string("/proc/self/statm") {
            let mut fields = statm.split_ascii_whitespace();
            if let (Some(size), Some(resident)) = (number(fields.next()), number(fields.next())) {
                self.virtual_memory.set(size * PAGE_BYTES);
                self.resident_memory.set(resident * PAGE_BYTES);
            }
        }
        if let Ok(stat) = std::fs::read_to_string("/proc/self/stat")
            && let Some((_, rest)) = stat.rsplit_once(") ")
        {
            // Fields 14 and 15 of the line; `rest` begins with field 3.
            let mut fields = rest.split_ascii_whitespace().skip(11);
            if let (Some(user), Some(system)) = (number(fields.next()), number(fields.next())) {
                let seconds = (user + system) / TICKS_PER_SECOND;
                self.cpu_seconds
                    .inc_by((seconds - self.cpu_seconds.get()).max(0.0));
            }
        }
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            self.open_files.set(files.count() as f64);
        }
    }
}
