//! What a handler says is what the caller hears.

use prost::Message;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

use super::fake::{Served, VERIFY, WATCH, call, client, code, drain, reading, within};
use crate::error::{Code, CoreError};
use crate::rpc::method;

#[test]
fn the_methods_are_those_of_the_protos() {
    let verify = method(VERIFY).unwrap();
    assert_eq!(
        (
            verify.service.as_str(),
            verify.name.as_str(),
            verify.streaming
        ),
        ("helixflow.v1.AuthService", "AuthService/Verify", false)
    );
    assert!(method(WATCH).unwrap().streaming);
    assert!(method("/helixflow.v1.AuthService/Nothing").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_message_in_one_message_out() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    let answer = reading(call(&client, VERIFY));
    let incoming = served.call().await;
    assert_eq!(incoming.method.name, "AuthService/Verify");
    assert_eq!(incoming.message, "question");
    assert_eq!(incoming.request_id, "req-1");
    let caller = incoming.caller.as_ref().unwrap();
    assert!(caller.address.ip().is_loopback());
    assert_eq!(caller.service, None);
    incoming.reply.finish(Some("answer".into()));
    assert!(!incoming.reply.send("too late".into()));
    assert_eq!(answer.await.unwrap().unwrap(), ["answer"]);
    assert_eq!(client.server().unwrap().as_ref(), served.address());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_comes_whole_before_and_behind_messages() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    let error = CoreError::new(Code::AccountLocked, "wait")
        .with_param("email")
        .with_retry_after(7);
    let answer = reading(call(&client, VERIFY));
    served.call().await.reply.fail(error.clone());
    assert_eq!(answer.await.unwrap().unwrap_err(), error);

    let mut stream = call(&client, WATCH);
    let (first, incoming) = tokio::join!(within(stream.next()), async {
        let incoming = served.call().await;
        assert!(incoming.reply.send("one".into()));
        incoming
    });
    assert_eq!(first.unwrap().unwrap(), "one");
    incoming.reply.send("two".into());
    incoming.reply.fail(error.clone());
    assert_eq!(within(stream.next()).await.unwrap().unwrap(), "two");
    assert_eq!(within(stream.next()).await.unwrap_err(), error);
    assert_eq!(within(stream.next()).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_is_dropped_is_internal() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    let answer = reading(call(&client, VERIFY));
    drop(served.call().await);
    assert_eq!(code(answer.await.unwrap()), Code::Internal);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_methods_of_the_services_exist() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    for path in [
        "/helixflow.v1.AuthService/Nothing",
        "/helixflow.v1.Inference/Generate",
        "/x",
    ] {
        let refused = drain(call(&client, path)).await;
        assert_eq!(code(refused), Code::MethodNotAllowed, "{path}");
    }
    assert!(!served.has_call());
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_what_is_served() {
    let served = Served::start().await;
    let client = client(&[served.address()]);
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let mut asked = client.call(
        path.parse().unwrap(),
        list.encode_to_vec().into(),
        String::new(),
        Some(super::fake::LIMIT),
    );
    let told = within(asked.next()).await.unwrap().unwrap();
    let told = ServerReflectionResponse::decode(told).unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = told.message_response else {
        panic!("no list: {told:?}");
    };
    let mut names: Vec<_> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    names.retain(|name| !name.starts_with("grpc.reflection"));
    names.sort();
    assert_eq!(
        names,
        [
            "grpc.health.v1.Health",
            "helixflow.v1.AdminService",
            "helixflow.v1.AuthService"
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_of_each_service() {
    let served = Served::start().await;
    let client = client(&[served.address()]);
    for (serving, expected) in [(false, 2), (true, 1)] {
        served.health.set(serving).await;
        for service in ["", "helixflow.v1.AuthService"] {
            let asked = client.call(
                "/grpc.health.v1.Health/Check".parse().unwrap(),
                HealthCheckRequest {
                    service: service.into(),
                }
                .encode_to_vec()
                .into(),
                String::new(),
                None,
            );
            let told = drain(asked).await.unwrap().remove(0);
            assert_eq!(HealthCheckResponse::decode(told).unwrap().status, expected);
        }
    }
}
