//! Which connections are kept, which are used again, and when they are closed.

use super::*;

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let (address, connections) = echo().await;
    let client = client();
    for size in [0, 1, 1000, 100_000, 3_000_000] {
        let text = "x".repeat(size);
        assert_eq!(post(&client, address, &text).await.unwrap(), (200, text));
    }
    // In chunks of its own, there and back.
    let chunks = (0..1000).map(|n| Ok::<_, Infallible>(Frame::data(Bytes::from(format!("{n} ")))));
    let request = Request::post("/").body(StreamBody::new(stream::iter(chunks)));
    let response = client
        .send(peer(address), request.unwrap(), ())
        .await
        .unwrap();
    assert!(!response.headers().contains_key("content-length"));
    let body = soon("the body", response.into_body().collect())
        .await
        .unwrap();
    let expected: String = (0..1000).map(|n| format!("{n} ")).collect();
    assert_eq!(body.to_bytes(), expected);
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    assert_eq!(client.pool.len(), 1);
}

#[tokio::test]
async fn requests_at_one_time_have_connections_of_their_own_and_few_are_kept() {
    let (address, connections) = echo().await;
    let client = client();
    let (senders, bodies): (Vec<_>, Vec<_>) = (0..5)
        .map(|_| mpsc::unbounded_channel::<Result<Frame<Bytes>, Infallible>>())
        .unzip();
    let answers = bodies.into_iter().map(|mut receiver| {
        let body = stream::poll_fn(move |cx| receiver.poll_recv(cx));
        client.send(
            peer(address),
            Request::post("/").body(StreamBody::new(body)).unwrap(),
            (),
        )
    });
    let sending = async {
        for sender in senders {
            sender.send(Ok(Frame::data(Bytes::from("hello")))).unwrap();
        }
    };
    let (answers, ()) = tokio::join!(futures::future::join_all(answers), sending);
    for answer in answers {
        let body = soon("a body", answer.unwrap().into_body().collect()).await;
        assert_eq!(body.unwrap().to_bytes(), "hello");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 5);
    assert!(client.pool.len() <= 2);
}

/// A pod that answers one request on each connection, waits for a word, sends `then` or closes without one, and says so.
async fn ending(
    then: &'static str,
) -> (
    SocketAddr,
    Arc<AtomicUsize>,
    mpsc::UnboundedSender<()>,
    mpsc::UnboundedReceiver<()>,
) {
    let (word, words) = mpsc::unbounded_channel();
    let (says, said) = mpsc::unbounded_channel();
    let words = Arc::new(tokio::sync::Mutex::new(words));
    let (address, connections) = pod(move |mut stream, _| {
        let (words, says) = (Arc::clone(&words), says.clone());
        async move {
            read_request(&mut stream).await.unwrap();
            let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            stream.write_all(ok.as_bytes()).await.unwrap();
            words.lock().await.recv().await.unwrap();
            if then.is_empty() {
                drop(stream);
                says.send(()).unwrap();
            } else {
                stream.write_all(then.as_bytes()).await.unwrap();
                says.send(()).unwrap();
                std::future::pending::<()>().await;
            }
        }
    })
    .await;
    (address, connections, word, said)
}

#[tokio::test]
async fn a_connection_on_which_something_came_while_it_waited_is_not_used() {
    for then in [
        "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        "\r\n",
        "",
    ] {
        let (address, connections, word, mut said) = ending(then).await;
        let client = client();
        for _ in 0..3 {
            assert_eq!(post(&client, address, "x").await.unwrap().1, "ok");
            assert_eq!(client.pool.len(), 1);
            word.send(()).unwrap();
            soon("the pod", said.recv()).await.unwrap();
        }
        assert_eq!(connections.load(Ordering::SeqCst), 3);
    }
}

/// A kept connection on which nothing can be sent any more, and which does not show it.
async fn kept_and_broken(client: &Client, address: SocketAddr) {
    let stream = TcpStream::connect(address).await.unwrap();
    socket2::SockRef::from(&stream)
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    client.pool.put(address, PodStream::Plain(stream));
}

#[tokio::test]
async fn only_a_request_of_which_nothing_was_sent_goes_on_another_connection() {
    let quiet = |read: &'static str| {
        pod(move |mut stream, number| async move {
            if number == 0 {
                std::future::pending::<()>().await;
            }
            while read_request(&mut stream).await.is_some() {
                stream.write_all(read.as_bytes()).await.unwrap();
            }
        })
    };
    let (address, connections) = quiet("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    let client = client();
    kept_and_broken(&client, address).await;
    assert_eq!(post(&client, address, "x").await.unwrap().1, "ok");
    assert_eq!(connections.load(Ordering::SeqCst), 2);

    // A pod that closes a kept connection when it has read the next request may have done what that asked for.
    let (address, connections) = pod(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        stream.write_all(ok.as_bytes()).await.unwrap();
        read_request(&mut stream).await.unwrap();
    })
    .await;
    post(&client, address, "x").await.unwrap();
    let error = post(&client, address, "x").await.unwrap_err();
    assert!(matches!(error, Error::Closed), "{error:?}");
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_connection_with_tls_is_kept_for_the_name_it_was_made_for() {
    let names = vec!["a-pods.n.svc".to_owned(), "b-pods.n.svc".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let (address, connections) = pod(move |stream, _| {
        let acceptor = acceptor.clone();
        async move {
            let stream = acceptor.accept(stream).await.unwrap();
            let server = hyper::server::conn::http1::Builder::new();
            let echo = service_fn(|request: Request<Incoming>| async {
                Ok::<_, Infallible>(Response::new(request.into_body()))
            });
            let _ = server.serve_connection(TokioIo::new(stream), echo).await;
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.crt");
    std::fs::write(&ca, made.cert.pem()).unwrap();
    let trust = Trust::load(&crate::model_tls::ModelTlsArgs { model_ca: Some(ca) }).unwrap();
    let client = Client { trust, ..client() };
    for (name, size, expected) in [("a", 10, 1), ("a", 1_000_000, 1), ("b", 10, 2), ("a", 0, 2)] {
        let name = format!("{name}-pods.n.svc");
        let peer = Peer {
            address,
            tls: Some(&name),
        };
        let text = "x".repeat(size);
        let request = Request::post("/").body(Full::new(Bytes::from(text.clone())));
        let sent = client.send(peer, request.unwrap(), ());
        let body = soon("a head", sent).await.unwrap().into_body();
        assert_eq!(
            soon("a body", body.collect()).await.unwrap().to_bytes(),
            text
        );
        assert_eq!(connections.load(Ordering::SeqCst), expected);
    }
    assert_eq!(client.pool.len(), 2);
    // And none of them is used without TLS.
    assert!(client.pool.take(peer(address)).is_none());
}

#[tokio::test]
async fn connections_are_closed_when_nobody_has_used_them_for_long() {
    let (ends, mut ended) = mpsc::unbounded_channel();
    let (address, _) = pod(move |mut stream, _| {
        let ends = ends.clone();
        async move {
            while read_request(&mut stream).await.is_some() {
                let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                stream.write_all(ok.as_bytes()).await.unwrap();
            }
            ends.send(()).unwrap();
        }
    })
    .await;
    let client = client_that_keeps(Duration::from_millis(100));
    post(&client, address, "x").await.unwrap();
    soon("the end of the connection", ended.recv()).await;
    assert!(client.pool.len() == 0);
}

#[tokio::test]
async fn whoever_stops_waiting_closes_the_connection() {
    let (ends, mut ended) = mpsc::unbounded_channel();
    let (address, _) = pod(move |mut stream, number| {
        let ends = ends.clone();
        async move {
            read_request(&mut stream).await.unwrap();
            if number == 0 {
                let start = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n";
                stream.write_all(start.as_bytes()).await.unwrap();
            }
            ends.send(stream.read(&mut [0]).await.unwrap_or(0)).unwrap();
        }
    })
    .await;
    let client = client();
    let request = || {
        Request::post("/")
            .body(Full::new(Bytes::from("x")))
            .unwrap()
    };
    let response = soon("the head", client.send(peer(address), request(), ()))
        .await
        .unwrap();
    let mut body = response.into_body();
    soon("a chunk", body.frame()).await.unwrap().unwrap();
    drop(body);
    assert_eq!(soon("the end", ended.recv()).await, Some(0));
    // Before the head.
    let waiting = client.send(peer(address), request(), ());
    assert!(
        tokio::time::timeout(Duration::from_millis(50), waiting)
            .await
            .is_err()
    );
    assert_eq!(soon("the end", ended.recv()).await, Some(0));
    assert_eq!(client.pool.len(), 0);
}
