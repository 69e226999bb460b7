// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Escrow for batch jobs
/// @notice A worker signs a quote, the client signs an order, anyone opens the job with both. The client's acceptance settles
/// it at once. Otherwise every silence has an end in code:
///
///   None -- open --> Open -- submit --> Submitted -- settle | finalize --> Settled
///                     |                     |
///                     |                     +-- Disputes.open --> Disputed -- Disputes.resolve --> Settled
///                     +-- settle --> Settled
///                     +-- refund | fail --> Refunded           Submitted -- fail --> Refunded
///
/// The client is silent after the submission: anyone finalizes after the window and the worker is paid. The worker is silent
/// until the deadline: anyone refunds the client and the worker's penalty is slashed. The resolver is silent: the dispute
/// ends as a draw (IDisputes). A worker that says "I failed" before the deadline loses a quarter of the penalty, always less
/// than silence; one that takes back what it submitted loses as much as in a dispute that it loses, so that waiting for the
/// challenge and running ahead of it gains nothing.
/// The quote is calldata in every call and its digest is the job's id, so a job keeps the terms it was opened with.
interface IJobs {
    enum State {
        None,
        Open,
        Submitted,
        Disputed,
        Settled,
        Refunded
    }

    /// @param specHash Content hash of the job's specification.
    /// @param client Whose vault balance pays.
    /// @param worker The hot key that signs this quote and the submission.
    /// @param token ERC-20 or the native coin; of amount and penalty.
    /// @param amount The most the job can cost: locked at `open`.
    /// @param penalty Stake of the worker's owner that is held while the job is open.
    /// @param validBefore Time before which the job must be opened.
    /// @param deadline Time before which the result must be submitted.
    /// @param window Seconds after the submission in which the client may dispute.
    /// @param resolver Who judges a dispute; zero means that there is none.
    /// @param salt Makes two equal jobs two.
    struct Quote {
        bytes32 specHash;
        address client;
        address worker;
        address token;
        uint128 amount;
        uint128 penalty;
        uint40 validBefore;
        uint40 deadline;
        uint40 window;
        address resolver;
        bytes32 salt;
    }

    /// @param windowEnd From the submission to the end: the first moment at which silence has accepted it.
    /// @param claimed From the submission to the end: what the worker asked for, at most the quote's amount.
    /// @param resultHash What was submitted, or accepted without a submission; zero when there is none or it was refunded.
    struct Job {
        State state;
        uint40 windowEnd;
        uint128 claimed;
        bytes32 resultHash;
    }

    error Jobs_NotAContract(address account);
    error Jobs_ZeroAddress();
    error Jobs_ZeroAmount();
    error Jobs_Expired(uint40 validBefore, uint256 now_);
    error Jobs_DeadlineOutOfRange(uint40 deadline, uint256 now_);
    error Jobs_WindowOutOfRange(uint40 window);
    error Jobs_WrongState(bytes32 jobId, State state);
    error Jobs_WorkerRetired(address worker);
    error Jobs_BadSignature(bytes32 jobId, address signer);
    error Jobs_TooEarly(bytes32 jobId, uint256 readyAt, uint256 now_);
    error Jobs_TooLate(bytes32 jobId, uint256 endedAt, uint256 now_);
    error Jobs_OverAmount(bytes32 jobId, uint128 amount, uint128 given);
    error Jobs_BelowClaimed(bytes32 jobId, uint128 claimed, uint128 given);
    error Jobs_WrongResult(bytes32 jobId, bytes32 submitted, bytes32 given);
    error Jobs_NoResult(bytes32 jobId);
    error Jobs_NotWorker(bytes32 jobId, address caller);
    error Jobs_NotModule(address caller);

    event Opened(bytes32 indexed jobId, address indexed client, address indexed worker, Quote quote);
    event Submitted(bytes32 indexed jobId, bytes32 resultHash, uint128 claimed, uint40 windowEnd);
    event Settled(bytes32 indexed jobId, address payout, uint128 paid);
    event Refunded(bytes32 indexed jobId);
    event Failed(bytes32 indexed jobId);
    event Disputed(bytes32 indexed jobId);

    /// @notice Locks `amount` of the client's vault balance and `penalty` of the worker's stake. Anyone may submit a quote
    /// without a penalty; one with a penalty the worker or its owner alone, so that nobody is held to a job it never heard of.
    /// Warning: of a penalty that is slashed the client gets half, and never more than half of the cap of one slash
    /// (IWorkers.bookSlash): it makes breaking the word dear, it does not insure the job.
    /// @param workerSignature By the worker's key over the quote.
    /// @param clientSignature By the client over Order{jobId}; not read when the client itself calls.
    function open(Quote calldata quote, bytes calldata workerSignature, bytes calldata clientSignature)
        external
        returns (bytes32 jobId);

    /// @notice The result is there, before the deadline, and is neither 0 nor 1. Anyone may submit; the window begins.
    /// Warning: silence pays. A client that does not dispute within the window pays what was claimed, whatever the hash stands
    /// for and whether or not it ever got the result; where the quote names no resolver it can not dispute at all.
    /// @param claimed What the worker asks for, at most the quote's amount.
    /// @param signature By the worker over Submission{jobId, resultHash, claimed}; not read when the worker itself calls.
    function submit(Quote calldata quote, bytes32 resultHash, uint128 claimed, bytes calldata signature) external;

    /// @notice The client accepts: pays `amount`, returns the rest, at once. Anyone may submit.
    /// Before the submission the client can only accept the whole amount; after it, not less than what was claimed and only
    /// the result that was submitted.
    /// @param signature By the client over Acceptance{jobId, resultHash, amount}; not read when the client itself calls.
    function settle(Quote calldata quote, bytes32 resultHash, uint128 amount, bytes calldata signature) external;

    /// @notice After the window: pays what was claimed. Anyone may call.
    function finalize(Quote calldata quote) external;

    /// @notice From the deadline on, when nothing was submitted: returns everything, slashes the penalty. Anyone may call,
    /// and gets the reporter's share of the slash.
    function refund(Quote calldata quote) external;

    /// @notice Worker or its owner: gives the job up and returns everything. Before the deadline, when nothing was submitted,
    /// it slashes a quarter of the penalty; after a submission the whole of it. Nobody gets the reporter's share.
    /// Warning: where another slash has left less stake than the penalty, the cap can make silence cheaper than this.
    function fail(Quote calldata quote) external;

    /// @notice Module only (Disputes): stops the window.
    function dispute(Quote calldata quote) external returns (Job memory);

    /// @notice Module only (Disputes): pays `toWorker`, at most what was claimed, and returns the rest.
    /// @param penalize Whether the worker's penalty is slashed in favour of the client, which is the reporter as well.
    function resolve(Quote calldata quote, uint128 toWorker, bool penalize) external;

    function job(bytes32 jobId) external view returns (Job memory);

    /// @notice EIP-712 digest of the quote, which is what the worker signs.
    function jobIdOf(Quote calldata quote) external view returns (bytes32);

    function orderDigest(bytes32 jobId) external view returns (bytes32);

    function submissionDigest(bytes32 jobId, bytes32 resultHash, uint128 claimed) external view returns (bytes32);

    function acceptanceDigest(bytes32 jobId, bytes32 resultHash, uint128 amount) external view returns (bytes32);

    function domainSeparator() external view returns (bytes32);
}
