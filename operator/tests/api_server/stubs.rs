//! Runtime pods and a gateway that only answer `/metrics`: a fluid model of an engine, fed by requests that come by chance.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ashlar_crds::names::RUNTIME_PORT;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::support::outer_address;

/// The model moves so often.
const TICK: Duration = Duration::from_millis(20);
/// Seconds of an engine's step, and of each request in it.
const STEP_SECONDS: f64 = 0.022;
const STEP_SECONDS_PER_REQUEST: f64 = 0.000_45;
/// Tokens of an answer.
const ANSWER_TOKENS: f64 = 180.0;
/// Requests that fill a pod's cache.
const MAX_RUNNING: f64 = 38.0;

/// One pod's engine: requests as a fluid, whole ones as far as it tells.
#[derive(Default)]
struct Engine {
    arrived: f64,
    waiting: f64,
    running: f64,
    generated: f64,
    finished: f64,
}

impl Engine {
    fn work(&mut self, seconds: f64, arrivals: f64) {
        self.arrived += arrivals;
        self.waiting += arrivals;
        let admitted = self.waiting.min(MAX_RUNNING - self.running);
        self.waiting -= admitted;
        self.running += admitted;
        let step = STEP_SECONDS + STEP_SECONDS_PER_REQUEST * self.running;
        let tokens = self.running / step * seconds;
        let ended = (tokens / ANSWER_TOKENS).min(self.running);
        self.generated += tokens;
        self.running -= ended;
        self.finished += ended;
    }

    fn metrics(&self) -> String {
        let (waiting, finished) = (self.waiting.floor(), self.finished.floor());
        let running = self.arrived - finished - waiting;
        format!(
            "vllm:num_requests_waiting{{model_name=\"m\"}} {waiting}\n\
             vllm:num_requests_running{{model_name=\"m\"}} {running}\n\
             vllm:kv_cache_usage_perc{{model_name=\"m\"}} {}\n\
             vllm:generation_tokens_total{{model_name=\"m\"}} {}\n\
             vllm:request_success_total{{finished_reason=\"stop\",model_name=\"m\"}} {finished}\n",
            self.running / MAX_RUNNING,
            self.generated.floor(),
        )
    }
}

/// The pods of one service, and what comes to them.
pub struct Load {
    /// Namespace and name.
    service: (String, String),
    state: Mutex<(f64, Vec<Engine>)>,
    scrapes: Vec<AtomicUsize>,
}

impl Load {
    /// Serves the pods of a service at their addresses, with so many requests per second.
    pub async fn serve(
        service: (String, String),
        addresses: &[Ipv4Addr],
        rate: f64,
        seed: u64,
    ) -> Arc<Self> {
        let engines = addresses.iter().map(|_| Engine::default()).collect();
        let load = Arc::new(Self {
            service,
            state: Mutex::new((rate, engines)),
            scrapes: addresses.iter().map(|_| AtomicUsize::new(0)).collect(),
        });
        let port = u16::try_from(RUNTIME_PORT).unwrap();
        for (index, address) in addresses.iter().enumerate() {
            let load = Arc::clone(&load);
            answer(SocketAddr::from((*address, port)), move || {
                load.scrapes[index].fetch_add(1, Ordering::Relaxed);
                load.state().1[index].metrics()
            })
            .await;
        }
        tokio::spawn(Arc::clone(&load).play(StdRng::seed_from_u64(seed)));
        load
    }

    fn state(&self) -> std::sync::MutexGuard<'_, (f64, Vec<Engine>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on so many requests per second.
    pub fn set_rate(&self, rate: f64) {
        self.state().0 = rate;
    }

    /// How often the pod that was asked least was asked.
    pub fn scrapes(&self) -> usize {
        let scrapes = self.scrapes.iter().map(|n| n.load(Ordering::Relaxed));
        scrapes.min().unwrap_or(0)
    }

    /// Moves the model for ever: each request comes by itself, to the pods in turn.
    async fn play(self: Arc<Self>, mut rng: StdRng) {
        let (mut last, mut turn) = (Instant::now(), 0);
        let mut ticks = tokio::time::interval(TICK);
        loop {
            ticks.tick().await;
            let seconds = last.elapsed().as_secs_f64();
            last = Instant::now();
            let mut state = self.state();
            let (rate, engines) = &mut *state;
            let mut came = vec![0.0; engines.len()];
            let mut at = -(1.0 - rng.random::<f64>()).ln() / *rate;
            while at < seconds {
                came[turn] += 1.0;
                turn = (turn + 1) % came.len();
                at -= (1.0 - rng.random::<f64>()).ln() / *rate;
            }
            for (engine, came) in engines.iter_mut().zip(came) {
                engine.work(seconds, came);
            }
        }
    }

    /// What the gateway tells of the service.
    fn gateway_metrics(&self, text: &mut String) {
        let (namespace, name) = &self.service;
        let state = self.state();
        let ended: f64 = state.1.iter().map(|e| e.finished.floor()).sum();
        let arrived: f64 = state.1.iter().map(|e| e.arrived).sum();
        let labels = format!("name=\"{name}\",namespace=\"{namespace}\"");
        let _ = write!(
            text,
            "ashlar_gateway_held_requests{{{labels}}} 0\n\
             ashlar_gateway_in_flight_requests{{{labels}}} {}\n\
             ashlar_gateway_requests_total{{code=\"200\",{labels}}} {ended}\n",
            arrived - ended,
        );
    }
}

/// Services that a gateway knows; more may come.
pub type Loads = Arc<Mutex<Vec<Arc<Load>>>>;

/// Serves what one gateway tells of these services; returns where.
pub async fn gateway(loads: Loads) -> SocketAddr {
    answer(SocketAddr::new(outer_address(), 0), move || {
        let mut text = String::new();
        for load in loads.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            load.gateway_metrics(&mut text);
        }
        text
    })
    .await
}

/// Answers every request at an address with a text; returns the address.
async fn answer(
    address: SocketAddr,
    text: impl Fn() -> String + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let text = Arc::new(text);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let text = Arc::clone(&text);
            tokio::spawn(async move {
                let mut buffer = [0_u8; 4096];
                // One read is one request: they are short and come one at a time.
                while let Ok(1..) = socket.read(&mut buffer).await {
                    let text = text();
                    let head = format!(
                        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n",
                        text.len()
                    );
                    if socket.write_all((head + &text).as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}
