//! Condition types and reasons of `status.conditions`. A reason names the blocker; the message says what to do next.

/// A request sent now to `status.url` would be answered within the hold limit.
pub const READY: &str = "Ready";
/// The model's files are where the pods read them.
pub const MODEL_READY: &str = "ModelReady";
/// All wanted replicas of the newest revision are ready.
pub const WORKLOADS_READY: &str = "WorkloadsReady";
/// The address answers: gateway, keys and host names are in order.
pub const ENDPOINT_READY: &str = "EndpointReady";
/// Something sets the number of replicas and can see what it needs to.
pub const SCALING_READY: &str = "ScalingReady";

/// Reasons, CamelCase, shared by conditions, events and metrics.
pub mod reason {
    /// All is well.
    pub const AVAILABLE: &str = "Available";
    /// The spec passes the schema but cannot be built; the message has the path.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// No node has the GPUs that a pod asks for.
    pub const INSUFFICIENT_GPU: &str = "InsufficientGPU";
    /// The scheduler found no node; the message is the scheduler's own.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// The model is on its way.
    pub const MODEL_DOWNLOADING: &str = "ModelDownloading";
    /// The download failed; the message has the last words of `pull`.
    pub const MODEL_DOWNLOAD_FAILED: &str = "ModelDownloadFailed";
    /// The runtime could not load the model; the message has its last words.
    pub const MODEL_LOAD_FAILED: &str = "ModelLoadFailed";
    /// The engine is loading the model.
    pub const MODEL_LOADING: &str = "ModelLoading";
    /// An image cannot be pulled.
    pub const IMAGE_PULL_FAILED: &str = "ImagePullFailed";
    /// The container restarts again and again.
    pub const CRASH_LOOP: &str = "CrashLoop";
    /// The container was killed for memory.
    pub const OUT_OF_MEMORY: &str = "OutOfMemory";
    /// Pods are being created.
    pub const STARTING: &str = "Starting";
    /// Pods of an old revision finish their requests first.
    pub const DRAINING: &str = "Draining";
    /// A new revision replaces the old one.
    pub const ROLLING_OUT: &str = "RollingOut";
    /// The newest revision does not start; the old one serves.
    pub const REVISION_FAILED: &str = "RevisionFailed";
    /// No replica is wanted; the gateway holds requests and wakes the service.
    pub const SCALED_TO_ZERO: &str = "ScaledToZero";
    /// A service that slept starts its first pod; requests are held.
    pub const WAKING_UP: &str = "WakingUp";
    /// Too few pods answer with their metrics.
    pub const METRICS_UNAVAILABLE: &str = "MetricsUnavailable";
    /// An object of that name exists and is not ours.
    pub const NAME_TAKEN: &str = "NameTaken";
    /// The gateway may not read the Secret with the users' keys.
    pub const KEYS_UNREADABLE: &str = "KeysUnreadable";
    /// The Secret with the users' keys does not exist.
    pub const KEYS_MISSING: &str = "KeysMissing";
    /// Another service holds one of the hosts.
    pub const HOST_CONFLICT: &str = "HostConflict";
    /// The gateway has no ready endpoint.
    pub const GATEWAY_UNAVAILABLE: &str = "GatewayUnavailable";
    /// An API that the spec asks for is not installed.
    pub const API_NOT_INSTALLED: &str = "APINotInstalled";
    /// Admission refused the pod for its cache volume.
    pub const CACHE_FORBIDDEN: &str = "CacheForbidden";
    /// A ResourceQuota of the namespace has no room for the pod; the message has the quota's numbers.
    pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";
    /// Admission refused the pod for another cause; the message is admission's own.
    pub const POD_FORBIDDEN: &str = "PodForbidden";
    /// The API server does not let the operator write what the service needs; the message is its own.
    pub const FORBIDDEN: &str = "Forbidden";
    /// `replicas`, HPA, KEDA or kubectl sets the number of replicas.
    pub const FIXED_REPLICAS: &str = "FixedReplicas";
}
